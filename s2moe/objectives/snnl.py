"""Soft nearest neighbour loss: how entangled the classes are in a representation.

Frosst, Papernot & Hinton 2019, "Analyzing and Improving Representations with the Soft Nearest Neighbor Loss"; the
annealed temperature is Agarap & Azcarraga 2020's.

    SNNL(z, y, T) = −mean_i log ( Σ_{j≠i, y_j=y_i} exp(−D_ij / T)  /  Σ_{j≠i} exp(−D_ij / T) )

over the anchors i that have another row of their class. Low: classes lie apart. A positive coefficient
pulls classes together (SNNL-MoE), a negative one entangles them (Frosst et al.).

    D      cosine: 1 − cos(z_i, z_j) (Agarap);  squared_euclidean: ‖z_i − z_j‖² (Frosst et al.)
    exact  the formula, as a difference of two logsumexp
    eps    −log(ε + Σ_j p_ij [y_i = y_j]) with p = f / (ε + Σ f), f = exp(−D/T), ε = 1e-5: the public code's form,
           which saturates at −log ε for anchors without another row of their class

Computed in float32 (float64 stays).

Legend: M rows, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from s2moe.precision import full_precision

DISTANCES = ("cosine", "squared_euclidean")
EPSILON = 1e-5


def pairwise_distance(value_MD: Tensor, distance: str) -> Tensor:
    """D of all pairs of rows, [M, M], with gradient."""
    value_MD = full_precision(value_MD)
    with torch.autocast(value_MD.device.type, enabled=False):
        if distance == "cosine":
            unit_MD = F.normalize(value_MD, dim=-1)
            return 1 - unit_MD @ unit_MD.T
        # Distances do not depend on the mean, and lose fewer digits without it.
        value_MD = value_MD - value_MD.mean(0, keepdim=True)
        square_M = value_MD.square().sum(-1)
        return (square_M[:, None] + square_M - 2 * value_MD @ value_MD.T).clamp(min=0)


def soft_nearest_neighbour_loss(
    value_MD: Tensor,
    label_M: Tensor,
    temperature: Tensor | float,
    distance: str = "cosine",
    valid_M: Tensor | None = None,
    form: str = "exact",
) -> Tensor:
    """SNNL of rows with classes, a scalar; 0 where no row has another of its class.

    Args:
        temperature: positive; a tensor of one number where it is learned.
        valid_M: rows that count; the others are neither anchors nor neighbours.
        form: "exact" or "eps".
    """
    return entanglement(pairwise_distance(value_MD, distance), label_M, temperature, valid_M, form)


def entanglement(
    distance_MM: Tensor,
    label_M: Tensor,
    temperature: Tensor | float,
    valid_M: Tensor | None = None,
    form: str = "exact",
) -> Tensor:
    """``soft_nearest_neighbour_loss`` from the distances [M, M]."""
    rows = len(distance_MM)
    other_MM = ~torch.eye(rows, dtype=torch.bool, device=distance_MM.device)
    if valid_M is not None:
        other_MM = other_MM & valid_M[:, None] & valid_M
    same_MM = other_MM & (label_M[:, None] == label_M)
    score_MM = -distance_MM / temperature
    if form == "eps":
        power_MM = score_MM.exp() * other_MM
        share_M = (power_MM * same_MM).sum(1) / (EPSILON + power_MM.sum(1))
        anchor_M = torch.ones(rows, dtype=torch.bool, device=share_M.device) if valid_M is None else valid_M
        loss_M = -(EPSILON + share_M).log()
    else:
        anchor_M = same_MM.any(1)
        # Rows that are no anchors get a finite value (and no weight), since the gradient of an empty sum is NaN.
        loss_M = _log_sum(score_MM, other_MM | ~anchor_M[:, None]) - _log_sum(score_MM, same_MM | ~anchor_M[:, None])
    return (loss_M * anchor_M).sum() / anchor_M.sum().clamp(min=1)


def annealed_temperature(epoch: float, eta: float = 1.0, gamma: float = 0.55) -> float:
    """T = 1 / (η + i)^γ, with i the epoch from 0 (Agarap & Azcarraga 2020)."""
    return (eta + epoch) ** -gamma


def optimised_temperature(
    distance_MM: Tensor,
    label_M: Tensor,
    initial: float,
    steps: int,
    rate: float = 0.1,
    valid_M: Tensor | None = None,
    form: str = "exact",
) -> Tensor:
    """T = T₀ / t after gradient steps on t, from t = 1, that lower the loss (Frosst et al.'s code), without gradient.

    ``form`` is that of the loss which the temperature is for: the two have different slopes. They take the minimum over
    T, by one step at each evaluation from where the last one ended. This takes ``steps`` of them and starts anew each
    time, so that it has no state.
    """
    distance_MM = distance_MM.detach()
    inverse = torch.ones(1, dtype=distance_MM.dtype, device=distance_MM.device)
    for _ in range(steps):
        with torch.enable_grad():
            inverse.requires_grad_()
            loss = entanglement(distance_MM, label_M, initial / inverse, valid_M, form)
            (slope,) = torch.autograd.grad(loss, inverse)
        inverse = (inverse.detach() - rate * slope).clamp(min=1e-3)
    return initial / inverse


def _log_sum(score_MM: Tensor, counted_MM: Tensor) -> Tensor:
    return score_MM.masked_fill(~counted_MM, -torch.inf).logsumexp(1)
