"""Are the experts of a layer alike?

Experts are compared in three places: the rows by which the router knows them, their weights, and what they make of
the same tokens (a common probe batch, which all experts compute, routed or not). Agreement of weights is a weak sign:
an expert's hidden units may be ordered in any way, so equal experts can have orthogonal weights, and only experts that
started alike (copies of one, say) are compared fairly. Outputs do not have this fault.

Legend: E experts, M rows of the probe batch, D features, X any width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from s2moe.objectives.cka import alignment, linear_kernel, rbf_kernel

SIGMA = 0.8  # of the RBF kernel, as a multiple of the median distance


def mean_off_diagonal(matrix_EE: Tensor) -> Tensor:
    """Mean over pairs i ≠ j; NaN for a single expert."""
    experts = len(matrix_EE)
    own_EE = torch.eye(experts, dtype=torch.bool, device=matrix_EE.device)
    return matrix_EE.masked_fill(own_EE, 0).sum() / (experts * (experts - 1) or torch.nan)


def cosine(row_EX: Tensor) -> Tensor:
    """Cosine of each pair of rows, [E, E]: of the router's rows, of flattened weights. A row of zeros has cosine 0."""
    return cosine_of(row_EX.double() @ row_EX.double().T)


def cosine_of(product_EE: Tensor) -> Tensor:
    """The same from the rows' inner products, which can be summed over pieces of the rows."""
    length_E = product_EE.diagonal().clamp(min=torch.finfo(product_EE.dtype).tiny).sqrt()
    return product_EE / length_E[:, None] / length_E


def output_cosine(out_EMD: Tensor) -> Tensor:
    """Mean over rows of the cosine of two experts' outputs for the same row, [E, E]."""
    unit_MED = F.normalize(out_EMD.double(), dim=-1).transpose(0, 1)
    return torch.einsum("med,mfd->ef", unit_MED, unit_MED) / len(unit_MED)


def output_cka(out_EMD: Tensor, sigma: float | None = None) -> Tensor:
    """CKA of each pair of experts' outputs, [E, E]: linear, or RBF at ``sigma`` times the median distance."""
    out_EMD = out_EMD.double()
    kernel_EMM = linear_kernel(out_EMD) if sigma is None else rbf_kernel(out_EMD, sigma)
    return torch.stack([alignment(kernel_MM, kernel_EMM) for kernel_MM in kernel_EMM])
