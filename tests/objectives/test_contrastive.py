"""InfoNCE against its equation, its closed-form values, and finite differences.

Legend: M rows, D features.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2moe.objectives.contrastive import info_nce
from tests.moe import reference

M, D = 7, 4


def views() -> tuple[Tensor, Tensor]:
    first = torch.randn(M, D, dtype=torch.float64)
    return first.requires_grad_(), (first + 0.8 * torch.randn(M, D, dtype=torch.float64)).detach().requires_grad_()


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("some_invalid", [False, True])
def test_equals_its_equation(temperature: float, symmetric: bool, some_invalid: bool) -> None:
    first, second = views()
    valid_M = torch.tensor([True, True, False, True, False, True, True]) if some_invalid else None
    u, v = (first, second) if valid_M is None else (first[valid_M], second[valid_M])
    want = reference.info_nce(u, v, temperature)
    if symmetric:
        want = (want + reference.info_nce(v, u, temperature)) / 2
    got = info_nce(first, second, temperature, valid_M, symmetric).loss
    torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad(got, [first, second])
    for gradient, expected in zip(gradients, torch.autograd.grad(want, [first, second]), strict=True):
        torch.testing.assert_close(gradient, expected)
        if valid_M is not None:
            assert not gradient[~valid_M].any()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_orthogonal_rows_with_identical_views(temperature: float) -> None:
    """log(1 + (M − 1) e^(−1/τ)): own cosine 1, every other 0."""
    rows = 3 * torch.eye(M, dtype=torch.float64)
    result = info_nce(rows, rows, temperature)
    assert result.loss.item() == pytest.approx(math.log(1 + (M - 1) * math.exp(-1 / temperature)))
    assert result.accuracy.item() == 1


def test_collapsed_rows_cost_log_m() -> None:
    same = torch.ones(M, D, dtype=torch.float64)
    assert info_nce(same, same).loss.item() == pytest.approx(math.log(M))


def test_only_directions_count() -> None:
    first, second = views()
    scale_M1 = torch.rand(M, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(info_nce(first * scale_M1, second * 5).loss, info_nce(first, second).loss)


def test_accuracy_counts_rows_whose_own_view_is_nearest() -> None:
    first, second = views()
    for valid_M in (None, torch.arange(M) % 3 > 0):
        rows = range(M) if valid_M is None else valid_M.nonzero().flatten().tolist()
        nearest = [max(rows, key=lambda j, i=i: torch.cosine_similarity(first[i], second[j], dim=0)) for i in rows]
        hits = [own == other for own, other in zip(rows, nearest, strict=True)]
        assert info_nce(first, second, valid_M=valid_M).accuracy.item() == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_valid_costs_nothing(symmetric: bool) -> None:
    first, second = views()
    result = info_nce(first, second, valid_M=torch.zeros(M, dtype=torch.bool), symmetric=symmetric)
    assert result.loss.item() == 0
    assert result.accuracy.item() == 0
    for gradient in torch.autograd.grad(result.loss, [first, second]):
        assert torch.isfinite(gradient).all()


def test_a_zero_row_leaves_loss_and_gradient_finite() -> None:
    """An expert output can be exactly zero: a token that capacity dropped altogether."""
    first, second = views()
    zeroed = first * (torch.arange(M) > 0)[:, None]
    loss = info_nce(zeroed, second).loss
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, first)[0]).all()


def test_half_precision_rows_are_compared_in_float32() -> None:
    first, second = (view.detach().bfloat16() for view in views())
    got = info_nce(first, second).loss
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), reference.info_nce(first.double(), second.double(), 0.1), rtol=1e-5, atol=0
    )


def test_gradient_equals_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda u, v: info_nce(u, v, 0.3, symmetric=True).loss, views())
