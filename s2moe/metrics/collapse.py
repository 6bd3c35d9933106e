"""Representation collapse: do the hidden states of a class shrink to a point?

    RC = Tr(Σ_W Σ_B⁺),   Σ_W = (1/n) Σ_c Σ_{x in c} (x − μ_c)(x − μ_c)ᵀ,   Σ_B = Σ_c (n_c/n) (μ_c − μ)(μ_c − μ)ᵀ

The smaller, the more collapsed: within-class variation relative to that between classes (X-MoE, Chi et al. 2022;
the first figure of neural collapse, Papyan et al. 2020, times the number of classes). For an SMoE layer x are the
hidden states that enter the router. What a class is there, the papers do not spell out; the assigned expert is the
natural reading, the token to be predicted the usual one of neural collapse: both are of use.

Classes are weighted by their size, so that Σ_W + Σ_B is the covariance (the papers' classes are of equal size).
Σ_B has at most (classes − 1) directions; eigenvalues below ``THRESHOLD`` times the largest count as zero, always the
same, since the figure depends on it. A class with a single member adds nothing to Σ_W: with many of those (rare
words) the figure is too small, and comparable only at the same tokens.

Everything is accumulated in float64, so the sums of batches and ranks can be added before.

Legend: T tokens, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 1e-6


@dataclass
class Moments:
    """Counts, sums and products of the rows seen so far."""

    product_DD: Tensor  # Σ x xᵀ
    sum_D: Tensor
    rows: Tensor  # their number, [1]

    @classmethod
    def zero(cls, features: int, device: torch.device) -> Moments:
        return cls(
            *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((features,) * 2, features, 1))
        )

    def add(self, hidden_TD: Tensor) -> None:
        hidden_TD = hidden_TD.double()
        self.product_DD += hidden_TD.T @ hidden_TD
        self.sum_D += hidden_TD.sum(0)
        self.rows += len(hidden_TD)

    def covariance(self) -> Tensor:
        """Population covariance [D, D]."""
        mean_D = self.sum_D / self.rows
        return self.product_DD / self.rows - mean_D[:, None] * mean_D


@dataclass
class ClassSums:
    """Counts and sums of the rows of each class."""

    count_C: Tensor
    sum_CD: Tensor

    @classmethod
    def zero(cls, classes: int, features: int, device: torch.device) -> ClassSums:
        count_C = torch.zeros(classes, dtype=torch.float64, device=device)
        return cls(count_C, torch.zeros(classes, features, dtype=torch.float64, device=device))

    def add(self, hidden_TD: Tensor, class_T: Tensor) -> None:
        self.count_C += torch.bincount(class_T, minlength=len(self.count_C))
        self.sum_CD.index_add_(0, class_T, hidden_TD.double())

    def between(self) -> Tensor:
        """Σ_B, [D, D]. Classes without rows take no part."""
        total = self.count_C.sum()
        mean_CD = self.sum_CD / self.count_C.clamp(min=1)[:, None]
        deviation_CD = (mean_CD - self.sum_CD.sum(0) / total) * (self.count_C / total).sqrt()[:, None]
        return deviation_CD.T @ deviation_CD


def collapse(moments: Moments, sums: ClassSums) -> Tensor:
    """RC of the rows that were added to both; NaN where there is only one class, or a row is not finite."""
    between_DD = sums.between()
    within_DD = moments.covariance() - between_DD
    if int((sums.count_C > 0).sum()) < 2 or not within_DD.isfinite().all():
        return within_DD.new_tensor(torch.nan)
    value_D, direction_DD = torch.linalg.eigh(between_DD)
    counted_D = value_D > THRESHOLD * value_D[-1].clamp(min=0)
    along_D = ((within_DD @ direction_DD) * direction_DD).sum(0)  # uᵀ Σ_W u of each eigenvector u
    return (along_D[counted_D] / value_D[counted_D]).sum()


def representation_collapse(hidden_TD: Tensor, class_T: Tensor) -> Tensor:
    """RC of labelled rows. ``class_T``: int64, from 0; numbers without rows do no harm."""
    moments = Moments.zero(hidden_TD.shape[1], hidden_TD.device)
    sums = ClassSums.zero(int(class_T.max()) + 1, hidden_TD.shape[1], hidden_TD.device)
    moments.add(hidden_TD)
    sums.add(hidden_TD, class_T)
    return collapse(moments, sums)
