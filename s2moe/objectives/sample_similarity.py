"""Sample similarity loss: similar samples to the same experts, dissimilar ones to different experts.

Krishnamurthy, Watkins & Gaertner 2023, "Improving Expert Specialization in Mixture of Experts". With p_ni the
gate's probability of expert i for sample n, d_nm the distance of two samples, and K_nm = Σ_i p_ni p_mi,

    S_same = Σ_nm d_nm K_nm            chosen together, weighted by how different they are
    S_diff = Σ_nm d_nm (1 − K_nm)      = Σ_nm d_nm Σ_{i≠j} p_ni p_mj, as rows of p sum to 1

    pair_mean   L_s = β_s S_same / B²  −  β_d S_diff / (B² (M − 1))
    repo_sum    L_s = β_s S_same / M   −  β_d S_diff / (B² (M² − M))      as the authors' code computes it

Both subtract a multiple of one sum from another that differ by a constant only: the gradient is that of
Σ d K, and β_d merely rescales it. repo_sum grows with the square of the batch; β_s of pair_mean is β_s B² / M of it.

Legend: B samples, M experts, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.precision import full_precision

REDUCTIONS = ("pair_mean", "repo_sum")
DISTANCES = ("euclidean", "squared_euclidean")
SCALES = ("batch_max", "none")


def sample_distance(
    value_BD: Tensor, distance: str = "euclidean", scale: str = "batch_max", valid_B: Tensor | None = None
) -> Tensor:
    """d of all pairs of samples, [B, B], a constant for the gradient.

    Args:
        distance: the code's Euclidean distance, or its square, as the text has it.
        scale: "batch_max" divides by the largest distance of the batch (the CIFAR-100 runs), "none" does not (the
            MNIST runs).
        valid_B: samples that count; pairs with one that does not have distance 0.
    """
    value_BD = full_precision(value_BD).detach()
    found_BB = _squared_distance(value_BD)
    if distance == "euclidean":
        found_BB = found_BB.sqrt()
    found_BB = found_BB.to(value_BD.dtype)
    if valid_B is not None:
        found_BB = found_BB * (valid_B[:, None] & valid_B)
    if scale == "batch_max":
        found_BB = found_BB / found_BB.max().clamp(min=torch.finfo(found_BB.dtype).tiny)
    return found_BB


def _squared_distance(value_BD: Tensor) -> Tensor:
    """|x|² + |y|² − 2 x·y of all pairs, [B, B], in float64, in which the difference loses nothing that float32 keeps.

    A product of matrices; taking the difference of each pair is seven times slower for 512 images of MNIST.
    """
    value_BD = value_BD.double()
    with torch.autocast(value_BD.device.type, enabled=False):
        product_BB = value_BD @ value_BD.T
    norm_B = product_BB.diagonal()
    return (norm_B[:, None] + norm_B - 2 * product_BB).clamp(min=0).fill_diagonal_(0)


def sample_similarity_loss(
    prob_BM: Tensor,
    distance_BB: Tensor,
    same: float,
    different: float = 0.0,
    reduction: str = "pair_mean",
    valid_B: Tensor | None = None,
) -> Tensor:
    """L_s, a scalar, with gradient for the gate's probabilities.

    Args:
        same: β_s.
        different: β_d.
        valid_B: samples that count; the others are padding.

    Raises:
        ValueError: with fewer than two experts.
    """
    experts = prob_BM.shape[1]
    if experts < 2:
        raise ValueError("the sample similarity loss needs at least two experts")
    prob_BM = full_precision(prob_BM)
    if valid_B is not None:
        distance_BB = distance_BB * valid_B[:, None] * valid_B
    samples = torch.tensor(float(len(prob_BM))) if valid_B is None else valid_B.sum().clamp(min=1).to(prob_BM.dtype)
    with torch.autocast(prob_BM.device.type, enabled=False):
        together_BB = prob_BM @ prob_BM.T
    same_sum = (distance_BB * together_BB).sum()
    different_sum = (distance_BB * (1 - together_BB)).sum()
    pairs = samples.square()
    if reduction == "repo_sum":
        return same * same_sum / experts - different * different_sum / (pairs * (experts**2 - experts))
    return same * same_sum / pairs - different * different_sum / (pairs * (experts - 1))
