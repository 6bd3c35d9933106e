"""Centred kernel alignment (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited").

    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   HSIC(K, L) = Tr(H K H H L H),   H = I − 1/N

for two representations X, Y of the same N rows, with kernels K of X and L of Y. It lies in [0, 1], is 1 for
representations that are equal up to rotation and scale, and knows nothing of how their features are ordered.

    linear   K_ij = x_i · x_j, hence CKA = ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred X, Y (Frobenius norms)
    RBF      K_ij = exp(−‖x_i − x_j‖² / (2 (σ m)²)), with m the median of ‖x_i − x_j‖ over pairs i ≠ j

So σ is a multiple of the median distance, as is usual. The median is a bandwidth, a constant for the gradient; of an
even number of pairs it is the lower one. A kernel that is ``absolute`` has m = 1: there scale counts.

Differentiable, in float32 (float64 stays). Rows that are constant have no direction: their CKA is 0.

Legend: N rows, D and F features, any leading dimensions ``..`` of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.precision import full_precision


def linear_cka(first_ND: Tensor, second_NF: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Linear CKA of two representations of the same rows; ``valid_N`` False leaves a row out."""
    return alignment(linear_kernel(first_ND, valid_N), linear_kernel(second_NF, valid_N))


def rbf_cka(first_ND: Tensor, second_NF: Tensor, sigma: float, valid_N: Tensor | None = None) -> Tensor:
    """RBF CKA of two representations of the same rows, at ``sigma`` times each one's own median distance."""
    return alignment(rbf_kernel(first_ND, sigma, valid_N), rbf_kernel(second_NF, sigma, valid_N))


def alignment(first_NN: Tensor, second_NN: Tensor) -> Tensor:
    """CKA of two centred kernels [.., N, N]: their cosine."""
    product = (first_NN * second_NN).sum((-2, -1))
    squares = first_NN.square().sum((-2, -1)) * second_NN.square().sum((-2, -1))
    return product / squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def linear_kernel(value_ND: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Centred Gram matrix [.., N, N] of rows [.., N, D]; zero in the rows and columns that are left out.

    Scaled so that its largest rows have length 1, for the sums of squares to stay within float32.
    """
    value_ND = _centre(full_precision(value_ND), valid_N)
    with torch.autocast(value_ND.device.type, enabled=False):
        largest = value_ND.detach().square().sum(-1, keepdim=True).amax(-2, keepdim=True).sqrt()
        value_ND = value_ND / largest.clamp(min=torch.finfo(value_ND.dtype).tiny)
        return value_ND @ value_ND.mT


def rbf_kernel(value_ND: Tensor, sigma: float, valid_N: Tensor | None = None, absolute: bool = False) -> Tensor:
    """Centred RBF kernel [.., N, N] of width ``sigma``; zero where rows are left out.

    Args:
        absolute: the width is ``sigma`` itself, and not that many median distances.

    Raises:
        ValueError: unless ``sigma`` is positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, a multiple of the median distance (0.8, say), got {sigma}")
    # Distances do not depend on the mean, and lose fewer digits without it.
    value_ND = _centre(full_precision(value_ND), valid_N)
    with torch.autocast(value_ND.device.type, enabled=False):
        square_N = value_ND.square().sum(-1)
        square_NN = square_N[..., None] + square_N[..., None, :] - 2 * value_ND @ value_ND.mT
    square_NN = square_NN.clamp(min=0)
    own_NN = torch.eye(square_NN.shape[-1], dtype=torch.bool, device=square_NN.device)
    square_NN = square_NN.masked_fill(own_NN, 0)  # exactly, whatever was rounded above
    if not absolute:
        left_out_NN = own_NN if valid_N is None else own_NN | ~(valid_N[:, None] & valid_N)
        median = square_NN.detach().masked_fill(left_out_NN, torch.nan).flatten(-2).nanmedian(-1).values
        median = torch.where(median > 0, median, 1.0)[..., None, None]  # no pairs, or most of them alike: any will do
        square_NN = square_NN / median
    # K − 1, as centring takes any constant away: near 1, where distances are small, K itself has no digits left.
    kernel_NN = torch.expm1(-square_NN / (2 * sigma**2))
    # The rows' mean, then the columns': H K H, over the rows that count.
    return _centre(_centre(kernel_NN, valid_N).mT, valid_N)


def _centre(value_ND: Tensor, valid_N: Tensor | None) -> Tensor:
    """Minus the mean of the rows [.., N, D] that count; zero for the others."""
    if valid_N is None:
        return value_ND - value_ND.mean(-2, keepdim=True)
    weight_N1 = valid_N[:, None].to(value_ND.dtype)
    mean = (value_ND * weight_N1).sum(-2, keepdim=True) / weight_N1.sum().clamp(min=1)
    return (value_ND - mean) * weight_N1
