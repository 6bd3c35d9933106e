"""The soft nearest neighbour loss against its formula and published figures, in float64.

Legend: M rows, D features.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2moe.objectives.snnl import (
    annealed_temperature,
    entanglement,
    optimised_temperature,
    pairwise_distance,
    soft_nearest_neighbour_loss,
)

SQUARED = "squared_euclidean"
POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
ANGLES = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.3, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])


def distance_of(x_D: Tensor, y_D: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1 - x_D @ y_D / (x_D.norm() * y_D.norm())
    return ((x_D - y_D) ** 2).sum()


def formula(value_MD: Tensor, label_M: Tensor, temperature: float, distance: str, form: str) -> Tensor:
    """Row by row, as it is printed."""
    terms = []
    for i, anchor in enumerate(value_MD):
        power = {
            j: torch.exp(-distance_of(anchor, other, distance) / temperature)
            for j, other in enumerate(value_MD)
            if j != i
        }
        same = sum((p for j, p in power.items() if label_M[j] == label_M[i]), torch.zeros((), dtype=torch.float64))
        every = sum(power.values())
        if form == "eps":
            terms.append(-torch.log(1e-5 + same / (1e-5 + every)))
        elif any(label_M[j] == label_M[i] for j in power):
            terms.append(-torch.log(same / every))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("temperature", "value"), [(1.0, 0.318497), (2.0, 0.494581), (10.0, 0.917007), (100.0, 1.078798)]
)
def test_published_squared_euclidean_values(temperature: float, value: float) -> None:
    got = soft_nearest_neighbour_loss(POINTS, LABELS, temperature, SQUARED)
    assert got.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 0.318652), (100.0, 1.078772)])
def test_published_values_of_the_epsilon_form(temperature: float, value: float) -> None:
    got = soft_nearest_neighbour_loss(POINTS, LABELS, temperature, SQUARED, form="eps")
    assert got.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("epoch", "temperature", "value"), [(0, 1.0, 0.679725), (4, 0.4126, 0.311500), (14, 0.2255, 0.096125)]
)
def test_published_values_of_annealed_cosine(epoch: int, temperature: float, value: float) -> None:
    assert annealed_temperature(epoch) == pytest.approx(temperature, abs=5e-5)
    got = soft_nearest_neighbour_loss(ANGLES, LABELS, annealed_temperature(epoch), "cosine")
    assert got.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("batch", "value"), [(256, 2.3385), (128, 2.3761)])
def test_at_a_huge_temperature_only_the_class_sizes_count(batch: int, value: float) -> None:
    """-log((B/C - 1) / (B - 1)) for C equal classes; 128 is not divisible by 10, so its figure has the mean size."""
    label_M = torch.arange(batch) % 10
    got = soft_nearest_neighbour_loss(torch.randn(batch, 3, dtype=torch.float64), label_M, 1e12, SQUARED)
    sizes = label_M.bincount()[label_M].double()
    assert got.item() == pytest.approx(-((sizes - 1) / (batch - 1)).log().mean().item(), abs=1e-9)
    assert got.item() == pytest.approx(value, abs=5e-3)


@pytest.mark.parametrize("form", ["exact", "eps"])
@pytest.mark.parametrize("distance", ["cosine", SQUARED])
def test_value_and_gradients_equal_the_formula(distance: str, form: str) -> None:
    value_MD = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    label_M = torch.tensor([0, 1, 2, 0, 1, 2, 0, 5, 6])  # two anchors without another row of their class
    temperature = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    got = soft_nearest_neighbour_loss(value_MD, label_M, temperature, distance, form=form)
    want = formula(value_MD, label_M, temperature, distance, form).sum()
    torch.testing.assert_close(got, want)
    pairs = [torch.autograd.grad(loss, [value_MD, temperature]) for loss in (got, want)]
    for left, right in zip(*pairs, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("form", ["exact", "eps"])
def test_rows_that_do_not_count_change_nothing(form: str) -> None:
    value_MD = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    label_M = torch.tensor([0, 1, 0, 1, 2, 0, 1, 0])
    valid_M = torch.tensor([True, True, False, True, True, True, False, True])
    got = soft_nearest_neighbour_loss(value_MD, label_M, 0.5, SQUARED, valid_M, form)
    torch.testing.assert_close(got, formula(value_MD[valid_M], label_M[valid_M], 0.5, SQUARED, form))
    (gradient,) = torch.autograd.grad(got, value_MD)
    assert gradient[~valid_M].abs().max() < 1e-12


def test_without_any_pair_of_a_class_the_loss_and_its_gradient_are_zero() -> None:
    value_MD = torch.randn(4, 3, requires_grad=True)
    loss = soft_nearest_neighbour_loss(value_MD, torch.arange(4), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert not value_MD.grad.any()


def test_far_points_at_a_small_temperature_stay_finite() -> None:
    value_MD = (torch.randn(16, 4) * 100).requires_grad_()
    loss = soft_nearest_neighbour_loss(value_MD, torch.arange(16) % 3, 1e-3, SQUARED)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(value_MD.grad).all()


@pytest.mark.parametrize("form", ["exact", "eps"])
def test_the_optimised_temperature_lowers_its_own_form_of_the_loss_step_by_step(form: str) -> None:
    value_MD = torch.randn(12, 4, dtype=torch.float64)
    label_M = torch.arange(12) % 3
    label_M[-1] = 9  # an anchor without another row of its class, which counts in one of the forms
    value_MD[:, 0] += label_M * 2
    distance_MM = pairwise_distance(value_MD, SQUARED)

    def temperature(steps: int) -> Tensor:
        return optimised_temperature(distance_MM, label_M, 50.0, steps, form=form)

    losses = [entanglement(distance_MM, label_M, temperature(steps), form=form).item() for steps in (0, 1, 5, 50)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3

    inverse = torch.ones(1, dtype=torch.float64, requires_grad=True)  # two steps by hand
    for steps in (1, 2):
        (slope,) = torch.autograd.grad(formula(value_MD, label_M, 50.0 / inverse, SQUARED, form).sum(), inverse)
        inverse = (inverse.detach() - 0.1 * slope).requires_grad_()
        torch.testing.assert_close(temperature(steps), 50.0 / inverse.detach())


def test_distances_of_points_far_from_the_origin_are_exact() -> None:
    near_MD = torch.randn(6, 3)
    far = pairwise_distance(near_MD + 1000, SQUARED)
    torch.testing.assert_close(far, pairwise_distance(near_MD.double(), SQUARED).float(), rtol=1e-2, atol=1e-3)
    assert math.isclose(far.diagonal().max().item(), 0, abs_tol=1e-3)
