"""What experts that are chosen in a latent space stand for: how many there are, and what can be read off the space.

Nikolic, Oguz & Psaltis 2025 ("SMoE-VAE"). Figures are of test samples.

Legend: N samples, E experts, C classes, Z latent features.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

ACTIVE_SHARE = 0.005
HELD_OUT = 5  # one sample in so many tests a probe


def active_experts(expert_N: NDArray[np.int64], experts: int, share: float = ACTIVE_SHARE) -> NDArray[np.int64]:
    """The experts that at least this share of the samples choose, ascending.

    The published count asks for ten samples of some fifty batches of 64, which is .3% and depends on the batch.
    """
    counts_E = np.bincount(expert_N, minlength=experts)
    return np.nonzero(counts_E >= max(1, share * len(expert_N)))[0]


def purity(counts_EC: NDArray[Any]) -> float:
    """Share of samples whose class is the commonest of their expert; 1 where each expert has one class."""
    return float(counts_EC.max(1).sum() / counts_EC.sum())


def linear_probe(features_NZ: NDArray[np.floating[Any]], label_N: NDArray[np.int64], seed: int = 0) -> dict[str, float]:
    """How well a logistic regression reads labels off features.

    Features are standardised; one sample in five, drawn by chance, is held out.

    Returns:
        ``accuracy`` on the held-out samples, ``majority``: that of always saying the commonest label, ``labels``: how
        many different ones there are. With a single label, accuracy is 1.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order_N = np.random.default_rng(seed).permutation(len(label_N))
    test, train = order_N[: len(order_N) // HELD_OUT], order_N[len(order_N) // HELD_OUT :]
    known, counts = np.unique(label_N[train], return_counts=True)
    majority = float((label_N[test] == known[counts.argmax()]).mean())
    accuracy = majority
    if len(known) > 1:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an imperfect probe says what it says
            probe.fit(features_NZ[train], label_N[train])
        accuracy = float((probe.predict(features_NZ[test]) == label_N[test]).mean())
    return {"accuracy": accuracy, "majority": majority, "labels": float(len(np.unique(label_N)))}


def linear_partition(
    features_NZ: NDArray[np.floating[Any]], counts_E: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """A partition of the samples that says nothing but where they lie: groups of the given sizes, along a direction.

    The direction is drawn by chance. A probe for experts must be read beside one for such a partition, since a gate is
    a function of the features, too. Samples beyond the sum of the sizes belong to the last group.
    """
    direction_Z = np.random.default_rng(seed).standard_normal(features_NZ.shape[1])
    rank_N = np.empty(len(features_NZ), dtype=np.int64)
    rank_N[(features_NZ @ direction_Z).argsort(kind="stable")] = np.arange(len(features_NZ))
    group_N: NDArray[np.int64] = np.searchsorted(np.cumsum(counts_E), rank_N, side="right")
    return group_N.clip(max=len(counts_E) - 1)
