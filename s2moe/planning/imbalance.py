"""How much the busiest rank has to do: expert loads drawn at random, over the layers and groups of a cluster.

Experts differ for good: a layer's loads are drawn from a symmetric Dirichlet distribution with the coefficient of
variation that runs log as `layer_N/load_cv`. On top of it every micro-batch is a sample of tokens, multinomial,
in which the tokens of a sequence resemble one another: they count for fewer than they are (RESEMBLANCE is their
intraclass correlation). Per rank the number is large, so its normal approximation is drawn.

The ranks of an expert-parallel group wait for the busiest of them in every layer, and groups for one another once
a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESEMBLANCE = 0.01
REPEATS = 32  # steps drawn
MOST_DRAWS = 1_000_000  # numbers a step; micro-batches beyond are left out, which average out anyway


@dataclass(frozen=True)
class Imbalance:
    """Rows of the busiest rank over the mean.

    mean, p95: of a step, by which its all-to-alls and expert products are slower than balanced ones.
    peak: 95th percentile of the highest in any micro-batch, layer and group of a step: what memory must hold.
    """

    mean: float
    p95: float
    peak: float


def simulate(
    num_experts: int,
    expert_parallel: int,
    groups: int,
    layers: int,
    micro_batches: int,
    assignments: float,
    sequences: float,
    load_cv: float,
    seed: int = 0,
) -> Imbalance:
    """Draw steps of a cluster.

    Args:
        groups: expert-parallel groups, each with all experts.
        assignments, sequences: of one group in one micro-batch.
        load_cv: standard deviation of the experts' loads over their mean; 0 is perfect balance.
    """
    if expert_parallel == 1 or layers == 0:
        return Imbalance(1.0, 1.0, 1.0)
    generator = np.random.default_rng(seed)
    micro_batches = max(1, min(micro_batches, MOST_DRAWS // (groups * layers * expert_parallel) or 1))
    of_step, peaks = [], []
    for _ in range(REPEATS):
        share_LP = _shares(generator, num_experts, expert_parallel, layers, load_cv)
        slowest_LMG = _slowest(generator, share_LP, micro_batches, groups, assignments, sequences)
        of_step.append(slowest_LMG.mean((0, 1)).max())
        peaks.append(slowest_LMG.max())
    return Imbalance(float(np.mean(of_step)), float(np.quantile(of_step, 0.95)), float(np.quantile(peaks, 0.95)))


def _shares(
    generator: np.random.Generator, experts: int, ranks: int, layers: int, load_cv: float
) -> NDArray[np.float64]:
    """Each rank's share of a layer's rows, [layers, ranks]."""
    if load_cv == 0:
        return np.full((layers, ranks), 1 / ranks)
    # Var(share) = (1/E)(1 - 1/E) / (total + 1), so cv^2 = (E - 1) / (total + 1).
    total = max((experts - 1) / load_cv**2 - 1, 1e-3)
    share_LE = generator.dirichlet(np.full(experts, total / experts), size=layers)
    return share_LE.reshape(layers, ranks, -1).sum(2)


def _slowest(
    generator: np.random.Generator,
    share_LP: NDArray[np.float64],
    micro_batches: int,
    groups: int,
    assignments: float,
    sequences: float,
) -> NDArray[np.float64]:
    """Rows of the busiest rank over the mean, [layers, micro-batches, groups]."""
    layers, ranks = share_LP.shape
    effective = assignments / (1 + (assignments / sequences - 1) * RESEMBLANCE)
    share = share_LP[:, None, None, :]
    noise = generator.standard_normal((layers, micro_batches, groups, ranks), dtype=np.float32) * np.sqrt(share)
    # The multinomial's covariance: shares sum to one, so that what one rank gains the others lose.
    rows = share + (noise - share * noise.sum(-1, keepdims=True)) / math.sqrt(effective)
    return np.clip(rows.max(-1) * ranks, 1.0, ranks)
