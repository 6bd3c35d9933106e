"""In how many directions do hidden states vary?

Of the singular values σ of the centred rows, largest first, and s̃ = σ / Σσ:

    effective rank   exp(−Σ s̃ log s̃)                     Roy & Vetterli 2007
    stable rank      Σ σ² / σ_1² = ‖·‖_F² / ‖·‖_2²
    entropy          −Σ s̃ log s̃ / log min(rows, features), 1 for a flat spectrum

Fewer than about four rows a feature underestimate all three (n rows have at most n − 1 directions): the number of
rows belongs to the figures, which are comparable at the same number only.

Legend: N rows, D features, R = min(N, D) singular values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ENOUGH_ROWS = 4  # a feature


def singular_values(value_ND: Tensor) -> Tensor:
    """Of the centred rows, largest first, float64 [.., R]; NaN where a value is not finite."""
    value_ND = value_ND.double()
    if not value_ND.isfinite().all():
        return value_ND.new_full((*value_ND.shape[:-2], min(value_ND.shape[-2:])), torch.nan)
    return torch.linalg.svdvals(value_ND - value_ND.mean(-2, keepdim=True))


def singular_values_of(covariance_DD: Tensor, rows: int) -> Tensor:
    """The same from the rows' population covariance, for rows that were never in one place."""
    if not covariance_DD.isfinite().all():
        return covariance_DD.new_full((min(rows, len(covariance_DD)),), torch.nan)
    value_D = torch.linalg.eigvalsh(covariance_DD.double()).flip(0).clamp(min=0)
    return (rows * value_D).sqrt()[: min(rows, len(value_D))]


def spectrum_figures(sigma_R: Tensor) -> dict[str, float]:
    """effective_rank, stable_rank and spectral_entropy of singular values; NaN where all are zero."""
    sigma_R = sigma_R.double()
    share_R = sigma_R / sigma_R.sum()
    entropy = float(-torch.special.xlogy(share_R, share_R).sum())
    return {
        "effective_rank": math.exp(entropy),
        "stable_rank": float(sigma_R.square().sum() / sigma_R[0].square()),
        "spectral_entropy": entropy / math.log(len(sigma_R)) if len(sigma_R) > 1 else 1.0,
    }
