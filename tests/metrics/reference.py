"""The collapse metrics straight from their formulas, one token and one expert at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Rows = np.ndarray


def entropy(weights: Sequence[float]) -> float:
    """Of the positive weights, divided by their sum."""
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w > 0)


def margin(scores: Rows, choices: Sequence[int]) -> float:
    """Mean of the k-th minus the (k+1)-th highest score of the tokens that have both."""
    gaps = []
    for row, k in zip(scores, choices, strict=True):
        ordered = sorted(row, reverse=True)
        if 0 < k < len(ordered):
            gaps.append(ordered[k - 1] - ordered[k])
    return sum(gaps) / len(gaps) if gaps else math.nan


def jaccard(one: set[int], two: set[int]) -> float:
    return len(one & two) / len(one | two) if one | two else 1.0


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def collapse(rows: Rows, labels: Sequence[int], threshold: float) -> float:
    """Tr(Σ_W Σ_B⁺) from sums over rows and classes."""
    count, width = rows.shape
    mean = rows.mean(0)
    within, between = np.zeros((width, width)), np.zeros((width, width))
    for label in set(labels):
        members = [row for row, own in zip(rows, labels, strict=True) if own == label]
        centre = sum(members) / len(members)
        between += len(members) / count * np.outer(centre - mean, centre - mean)
        for row in members:
            within += np.outer(row - centre, row - centre) / count
    return float(np.trace(within @ np.linalg.pinv(between, rcond=threshold, hermitian=True)))


def singular_values(rows: Rows) -> Rows:
    return np.linalg.svd(rows - rows.mean(0), compute_uv=False)


def spectrum(sigma: Rows) -> dict[str, float]:
    share = [s / sum(sigma) for s in sigma]
    h = -sum(s * math.log(s) for s in share if s > 0)
    return {
        "effective_rank": math.exp(h),
        "stable_rank": sum(s**2 for s in sigma) / max(sigma) ** 2,
        "spectral_entropy": h / math.log(len(sigma)),
    }


def cosine(x: Rows, y: Rows) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def off_diagonal(matrix: Rows) -> float:
    experts = len(matrix)
    return sum(matrix[i][j] for i in range(experts) for j in range(experts) if i != j) / (experts * (experts - 1))


def linear_kernel(rows: Rows) -> Rows:
    return np.array([[x @ y for y in rows] for x in rows])


def rbf_kernel(rows: Rows, sigma: float) -> Rows:
    distance = np.array([[math.sqrt(((x - y) ** 2).sum()) for y in rows] for x in rows])
    others = sorted(distance[i, j] for i in range(len(rows)) for j in range(len(rows)) if i != j)
    width = sigma * others[(len(others) - 1) // 2]
    return np.exp(-(distance**2) / (2 * width**2))


def cka(first: Rows, second: Rows) -> float:
    """Of two kernels: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    centre = np.eye(len(first)) - 1 / len(first)

    def hsic(k: Rows, other: Rows) -> float:
        return float(np.trace(centre @ k @ centre @ centre @ other @ centre))

    return hsic(first, second) / math.sqrt(hsic(first, first) * hsic(second, second))


def pairs(matrix_of: Sequence[Rows], compare: object) -> Rows:
    """``compare`` for every pair."""
    return np.array([[compare(one, two) for two in matrix_of] for one in matrix_of])  # type: ignore[operator]
