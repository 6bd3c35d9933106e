"""CKA as an objective: its equation, its gradient, rows that are left out, and half precision.

Legend: N rows, D and F features.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2moe.objectives.cka import linear_cka, rbf_cka
from tests.metrics import reference

N, D, F = 8, 5, 3


def pair() -> tuple[Tensor, Tensor]:
    first = torch.randn(N, D, dtype=torch.float64)
    second = first[:, :F] + 0.7 * torch.randn(N, F, dtype=torch.float64)
    return first.requires_grad_(), second.detach().requires_grad_()


def plain_linear(x: Tensor, y: Tensor) -> Tensor:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred rows: the other of the two equal formulas."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def plain_rbf(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    kernels = []
    for rows in (x, y):
        squares = torch.stack([torch.stack([((a - b) ** 2).sum() for b in rows]) for a in rows])
        others = sorted(float(squares[i, j].detach()) for i in range(len(x)) for j in range(len(x)) if i != j)
        median = others[(len(others) - 1) // 2]
        kernels.append(centre @ torch.exp(-squares / (2 * sigma**2 * median)) @ centre)
    k, other = kernels
    return (k * other).sum() / ((k * k).sum() * (other * other).sum()).sqrt()


@pytest.mark.parametrize("sigma", [None, 0.8, 2.0])
@pytest.mark.parametrize("some_invalid", [False, True])
def test_equals_its_equation_and_gradient(sigma: float | None, some_invalid: bool) -> None:
    first, second = pair()
    valid_N = torch.tensor([True, True, False, True, True, False, True, True]) if some_invalid else None
    x, y = (first, second) if valid_N is None else (first[valid_N], second[valid_N])
    if sigma is None:
        got, want = linear_cka(first, second, valid_N), plain_linear(x, y)
        kernels = [reference.linear_kernel(rows.detach().numpy()) for rows in (x, y)]
    else:
        got, want = rbf_cka(first, second, sigma, valid_N), plain_rbf(x, y, sigma)
        kernels = [reference.rbf_kernel(rows.detach().numpy(), sigma) for rows in (x, y)]
    assert got.item() == pytest.approx(reference.cka(*kernels))
    torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad(got, [first, second])
    for gradient, expected in zip(gradients, torch.autograd.grad(want, [first, second]), strict=True):
        torch.testing.assert_close(gradient, expected)
        if valid_N is not None:
            assert not gradient[~valid_N].any()


@pytest.mark.parametrize("sigma", [None, 0.8])
def test_rows_without_direction_have_none_and_no_gradient_that_is_not_finite(sigma: float | None) -> None:
    first, second = pair()
    for nothing, valid_N in (
        (torch.zeros(N, D, dtype=torch.float64), None),
        (first, torch.zeros(N, dtype=torch.bool)),
        (first, torch.arange(N) == 3),
    ):
        value = nothing.detach().requires_grad_()
        cka = linear_cka(value, second, valid_N) if sigma is None else rbf_cka(value, second, sigma, valid_N)
        assert cka.item() == 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(cka, [value, second]))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_neither_overflows_nor_counts(scale: float) -> None:
    first, second = (value.detach().float() for value in pair())
    assert linear_cka(scale * first, second).item() == pytest.approx(linear_cka(first, second).item(), rel=1e-4)
    assert rbf_cka(scale * first, second, 0.8).item() == pytest.approx(rbf_cka(first, second, 0.8).item(), rel=1e-4)


def test_half_precision_is_computed_in_full() -> None:
    first, second = (value.detach().bfloat16() for value in pair())
    for got, want in (
        (linear_cka(first, second), linear_cka(first.double(), second.double())),
        (rbf_cka(first, second, 0.8), rbf_cka(first.double(), second.double(), 0.8)),
    ):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_sigma_must_be_positive() -> None:
    first, second = pair()
    with pytest.raises(ValueError, match="sigma must be positive, a multiple of the median distance"):
        rbf_cka(first, second, 0.0)
