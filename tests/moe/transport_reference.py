"""Balanced routing from its equations, in float64, one token and one expert at a time.

Legend: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from tests.moe import reference


def potentials(cost_TE: Tensor, entropy: float, iterations: int) -> tuple[list[float], list[float]]:
    """u, v after so many rounds of  u ← −log Σ_i exp(K + v),  v ← log(T/E) − log Σ_t exp(K + u),  and a last u."""
    tokens, experts = cost_TE.shape
    scaled = [[c / entropy for c in row] for row in cost_TE.tolist()]

    def rows(v: list[float]) -> list[float]:
        return [-math.log(sum(math.exp(scaled[t][i] + v[i]) for i in range(experts))) for t in range(tokens)]

    v = [0.0] * experts
    for _ in range(iterations):
        u = rows(v)
        v = [
            math.log(tokens / experts) - math.log(sum(math.exp(scaled[t][i] + u[t]) for t in range(tokens)))
            for i in range(experts)
        ]
    return rows(v), v


def plan(cost_TE: Tensor, entropy: float, iterations: int) -> Tensor:
    """Π = exp(u + K + v), [T, E]."""
    u, v = potentials(cost_TE, entropy, iterations)
    rows = cost_TE.tolist()
    return torch.tensor(
        [[math.exp(u[t] + c / entropy + v[i]) for i, c in enumerate(row)] for t, row in enumerate(rows)],
        dtype=torch.float64,
    )


def plan_rows(cost_TE: Tensor, entropy: float, iterations: int) -> list[Tensor]:
    """The same plan, differentiable in the cost through its own row alone, with v constant."""
    _, v = potentials(cost_TE.detach(), entropy, iterations)
    v_E = torch.tensor(v, dtype=torch.float64)
    return [reference.normalise_exp(cost_E / entropy + v_E) for cost_E in cost_TE]


def objective(plan_TE: Tensor, cost_TE: Tensor, entropy: float) -> float:
    """⟨Π, C⟩ − ξ ⟨Π, log Π⟩."""
    return ((plan_TE * cost_TE).sum() - entropy * (plan_TE * plan_TE.log()).sum()).item()


def best_sum_by_trial(score_TE: Tensor) -> float:
    """The highest sum of scores over all assignments in equal shares (⌊T/E⌋ or ⌈T/E⌉), by trying every one."""
    tokens, experts = score_TE.shape
    least, most = tokens // experts, -(-tokens // experts)
    sums = [
        sum(score_TE[t, i].item() for t, i in enumerate(experts_of))
        for experts_of in itertools.product(range(experts), repeat=tokens)
        if all(least <= experts_of.count(i) <= most for i in range(experts))
    ]
    return max(sums)


def best_sum(score_TE: Tensor) -> float:
    """The same by linear assignment: ⌈T/E⌉ places of each expert, of which the last may stay empty."""
    from scipy.optimize import linear_sum_assignment

    tokens, experts = score_TE.shape
    places = -(-tokens // experts)
    value = np.full((places * experts, places * experts), -1e9)  # further rows: places that stay empty
    value[:tokens] = np.repeat(score_TE.double().numpy(), places, axis=1)
    value[tokens:, places - 1 :: places] = 0
    row, column = linear_sum_assignment(value, maximize=True)
    return value[row[row < tokens], column[row < tokens]].sum()
