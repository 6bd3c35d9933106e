"""Balance losses against their equations, their closed-form values, and their gradients.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2moe.objectives.balance import (
    cv_squared,
    importance_loss,
    kl_balance_loss,
    masked_mean,
    mean_probability,
    noisy_load_loss,
    switch_balance_loss,
    z_loss,
)
from tests.moe import reference

T, E = 9, 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def mask() -> Tensor:
    return torch.tensor([True, False, True, True, False, True, True, False, True])


def assert_same_with_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, want)
    for left, right in zip(
        torch.autograd.grad(got, inputs, retain_graph=True), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("experts", [2, 5, 64])
def test_switch_is_one_at_balance_and_e_at_collapse(experts: int) -> None:
    even = torch.full((experts,), 1 / experts, dtype=torch.float64)
    one_hot = torch.eye(experts, dtype=torch.float64)[1]
    assert switch_balance_loss(even * 24, even).item() == pytest.approx(1)
    assert switch_balance_loss(one_hot * 24, one_hot).item() == pytest.approx(experts)
    # Even load: 1 whatever the probabilities, since they sum to 1.
    assert switch_balance_loss(even, torch.rand(experts, dtype=torch.float64).softmax(0)).item() == pytest.approx(1)


@pytest.mark.parametrize("form", ["switch", "gshard", "kl"])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_forms_equal_their_equations(form: str, masked: bool) -> None:
    logits_TE, mask_T = random(T, E), mask() if masked else None
    real_TE = logits_TE if mask_T is None else logits_TE[mask_T]
    choices = [reference.choose(row, 2) for row in real_TE]
    want = reference.balance(real_TE, choices, form)

    prob_E = mean_probability(logits_TE.softmax(-1), mask_T)
    counted = [e for chosen in choices for e, _ in (chosen[:1] if form == "gshard" else chosen)]
    load_E = torch.bincount(torch.tensor(counted), minlength=E)
    got = kl_balance_loss(prob_E) if form == "kl" else switch_balance_loss(load_E.double(), prob_E)
    assert_same_with_gradients(got, want, [logits_TE])


def test_switch_ignores_the_unit_of_the_load_and_sends_it_no_gradient() -> None:
    load_E, prob_E = random(E).square().detach().requires_grad_(), random(E).softmax(0)
    loss = switch_balance_loss(load_E, prob_E)
    torch.testing.assert_close(loss, switch_balance_loss(load_E * 1000, prob_E))
    assert torch.autograd.grad(loss, load_E, allow_unused=True)[0] is None


def test_no_load_at_all_costs_nothing() -> None:
    assert switch_balance_loss(torch.zeros(E), torch.full((E,), 1 / E)).item() == 0


@pytest.mark.parametrize("experts", [2, 16])
def test_kl_is_zero_at_balance_and_log_e_at_collapse(experts: int) -> None:
    assert kl_balance_loss(torch.full((experts,), 1 / experts)).item() == pytest.approx(0, abs=1e-6)
    assert kl_balance_loss(torch.eye(experts)[0]).item() == pytest.approx(math.log(experts))


def test_z_loss_of_equal_logits() -> None:
    """logsumexp of E equal logits c is c + log E."""
    assert z_loss(torch.full((T, E), 1.5)).item() == pytest.approx((1.5 + math.log(E)) ** 2)


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_equals_its_equation(masked: bool) -> None:
    logits_TE, mask_T = random(T, E), mask() if masked else None
    want = reference.z_loss(logits_TE if mask_T is None else logits_TE[mask_T])
    assert_same_with_gradients(z_loss(logits_TE, mask_T), want, [logits_TE])


def test_z_loss_survives_huge_logits() -> None:
    assert z_loss(torch.full((2, 4), 1e4)).item() == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-5)


def test_cv_squared_closed_forms() -> None:
    """0 for equal values, E − 1 when one expert has everything, unchanged by scaling."""
    assert cv_squared(torch.full((E,), 3.0)).item() == pytest.approx(0)
    assert cv_squared(torch.eye(E)[2] * 7).item() == pytest.approx(E - 1)
    value_E = torch.rand(E, dtype=torch.float64) + 1
    torch.testing.assert_close(cv_squared(value_E), cv_squared(value_E * 50), rtol=1e-8, atol=0)
    assert torch.isfinite(cv_squared(torch.zeros(E)))


@pytest.mark.parametrize("masked", [False, True])
def test_importance_equals_its_equation(masked: bool) -> None:
    logits_TE, mask_T = random(T, E), mask() if masked else None
    gate_TE = torch.zeros(T, E, dtype=torch.float64)
    for t, row in enumerate(logits_TE):
        for e, weight in reference.choose(row, 2):
            gate_TE = gate_TE.index_put((torch.tensor(t), torch.tensor(e)), weight)
    real_TE = logits_TE if mask_T is None else logits_TE[mask_T]
    want = reference.importance([reference.choose(row, 2) for row in real_TE], E)
    assert_same_with_gradients(importance_loss(gate_TE, mask_T), want, [logits_TE])


@pytest.mark.parametrize("k", [1, 2, E - 1])
@pytest.mark.parametrize("masked", [False, True])
def test_noisy_load_equals_its_equation(k: int, masked: bool) -> None:
    clean_TE, raw_TE, noise_TE = random(T, E), random(T, E), torch.randn(T, E, dtype=torch.float64)
    std_TE = torch.nn.functional.softplus(raw_TE) + 0.01
    noisy_TE = clean_TE + std_TE * noise_TE
    rows = mask() if masked else torch.ones(T, dtype=torch.bool)
    want = reference.smooth_load(clean_TE[rows], noisy_TE[rows], std_TE[rows], k)
    got = noisy_load_loss(clean_TE, noisy_TE, std_TE, k, rows if masked else None)
    assert_same_with_gradients(got, want, [clean_TE, raw_TE])


def test_smooth_load_is_the_chance_of_being_chosen_when_one_noise_is_drawn_again() -> None:
    """The definition behind the formula, by simulation: with T = 1 the loss is CV² of those chances."""
    k, draws = 2, 200_000
    clean_E, std_E = torch.randn(E, dtype=torch.float64), torch.rand(E, dtype=torch.float64) + 0.3
    noisy_E = clean_E + std_E * torch.randn(E, dtype=torch.float64)
    chance = []
    for i in range(E):
        again = noisy_E.repeat(draws, 1)
        again[:, i] = clean_E[i] + std_E[i] * torch.randn(draws, dtype=torch.float64)
        chance.append((again.topk(k).indices == i).any(-1).double().mean())
    want = reference.cv_squared(chance)
    assert noisy_load_loss(clean_E[None], noisy_E[None], std_E[None], k).item() == pytest.approx(want.item(), rel=0.02)


def test_noisy_load_refuses_to_choose_every_expert() -> None:
    with pytest.raises(ValueError, match="below the number of experts"):
        noisy_load_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2, 4), choices=4)


def test_masked_mean_of_nothing_is_zero() -> None:
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 0
    assert masked_mean(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True])).item() == 2


@pytest.mark.parametrize("name", ["switch", "kl", "z", "importance", "load"])
def test_nothing_but_padding_leaves_loss_and_gradient_finite(name: str) -> None:
    logits_TE, nothing = random(T, E), torch.zeros(T, dtype=torch.bool)
    prob_E = mean_probability(logits_TE.softmax(-1), nothing)
    loss = {
        "switch": lambda: switch_balance_loss(torch.zeros(E, dtype=torch.float64), prob_E),
        "kl": lambda: kl_balance_loss(prob_E),
        "z": lambda: z_loss(logits_TE, nothing),
        "importance": lambda: importance_loss(logits_TE.softmax(-1), nothing),
        "load": lambda: noisy_load_loss(logits_TE, logits_TE + 1, torch.ones_like(logits_TE), 2, nothing),
    }[name]()
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits_TE)[0]).all()


def test_gradients_equal_finite_differences() -> None:
    logits_TE = random(T, E)
    load_E = torch.arange(E, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: switch_balance_loss(load_E, mean_probability(x.softmax(-1), mask())), (logits_TE,)
    )
    assert torch.autograd.gradcheck(lambda x: kl_balance_loss(mean_probability(x.softmax(-1))), (logits_TE,))
    assert torch.autograd.gradcheck(lambda x: z_loss(x, mask()), (logits_TE,))
    assert torch.autograd.gradcheck(lambda x: importance_loss(x.softmax(-1), mask()), (logits_TE,))
