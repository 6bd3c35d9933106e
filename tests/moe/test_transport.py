"""The balanced plan: its iteration, its optimum, its edges, and that it does not make the host wait.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s2moe.moe.routing import RoutingContext
from s2moe.moe.transport import CHECK_EVERY, TransportOptions, column_error, sinkhorn
from tests.moe import transport_reference as exact

T, E = 11, 4


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device's value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return function(*args, **(kwargs or {}))


def cost(tokens: int = T, experts: int = E, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(tokens, experts, dtype=torch.float64)


def plan(cost_TE: Tensor, entropy: float = 1.0, **given: Any) -> Tensor:
    given = {"iterations": 20, **given}
    return (cost_TE / entropy + sinkhorn(cost_TE / entropy, **given)).softmax(-1)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("entropy", [0.3, 1.0])
@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("tokens", [T, 12, 3, 1])
def test_every_iteration_equals_the_equations(tokens: int, iterations: int, entropy: float, masked: bool) -> None:
    cost_TE = cost(tokens)
    mask_T = torch.arange(tokens) % 4 != 1
    got_TE = plan(cost_TE, entropy, iterations=iterations, mask_T=mask_T if masked else None)
    real_T = mask_T if masked else torch.ones_like(mask_T)
    torch.testing.assert_close(got_TE[real_T], exact.plan(cost_TE[real_T], entropy, iterations))
    torch.testing.assert_close(got_TE.sum(-1), torch.ones(tokens, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [T, 12, 3])
def test_the_limit_is_the_optimum(tokens: int) -> None:
    """Its marginals hold, and no step along them raises ⟨Π, C⟩ − ξ ⟨Π, log Π⟩."""
    cost_TE, entropy = cost(tokens), 0.5
    plan_TE = plan(cost_TE, entropy, iterations=500)
    torch.testing.assert_close(plan_TE.sum(0), torch.full((E,), tokens / E, dtype=torch.float64))
    best = exact.objective(plan_TE, cost_TE, entropy)
    for size in (0.3, 0.01):
        for _ in range(50):
            step_TE = torch.randn_like(plan_TE)
            step_TE -= step_TE.mean(0) + step_TE.mean(1, keepdim=True) - step_TE.mean()
            step_TE *= size / (step_TE / plan_TE).abs().max()  # stays positive
            assert exact.objective(plan_TE + step_TE, cost_TE, entropy) < best


def test_what_padding_holds_has_no_part() -> None:
    cost_TE, mask_T = cost(), torch.arange(T) != 4
    changed_TE = cost_TE.clone()
    changed_TE[4] = 1e4
    assert torch.equal(sinkhorn(cost_TE, 5, mask_T), sinkhorn(changed_TE, 5, mask_T))
    assert not torch.allclose(sinkhorn(cost_TE, 5), sinkhorn(changed_TE, 5))


def test_a_constant_of_a_token_changes_nothing() -> None:
    cost_TE = cost()
    torch.testing.assert_close(sinkhorn(cost_TE + 100 * torch.randn(T, 1), 3), sinkhorn(cost_TE, 3))


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_without_any_token_to_balance_there_is_no_bias(tokens: int) -> None:
    cost_TE, mask_T = cost(tokens), torch.zeros(tokens, dtype=torch.bool)
    assert torch.equal(sinkhorn(cost_TE, 5, mask_T), torch.zeros(E, dtype=torch.float64))
    assert column_error(cost_TE.softmax(-1), mask_T) == 0


def test_one_token_is_spread_over_all_experts() -> None:
    torch.testing.assert_close(plan(cost(1)), torch.full((1, E), 1 / E, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_logits_in_float32(scale: float) -> None:
    """exp(1e4) is far beyond float32. Nothing overflows, rows stay distributions, and float64 says the same."""
    cost_TE = cost(64, scale=scale).float()
    v_E, plan_TE = sinkhorn(cost_TE, 20), plan(cost_TE)
    torch.testing.assert_close(plan_TE.sum(-1), torch.ones(64))
    # Twenty iterations round scores of several times the scale about four times each, by 1e-7.
    torch.testing.assert_close(v_E.double(), sinkhorn(cost_TE.double(), 20), rtol=1e-4, atol=3e-5 * scale)
    if scale == 1:
        assert column_error(plan_TE) < 1e-5


def test_a_preference_that_all_tokens_share_is_taken_out_whatever_its_size() -> None:
    """A constant of an expert goes into v, at one iteration: the plan is that of the rest."""
    rest_TE = cost(64)
    shared_TE = rest_TE + torch.tensor([1e4, 0.0, -1e4, 30.0])
    torch.testing.assert_close(plan(shared_TE, iterations=60), plan(rest_TE, iterations=60))
    single_TE = plan(shared_TE.float(), iterations=60)  # whose scores near 1e4 are rounded to 1e-3
    torch.testing.assert_close(single_TE.double(), plan(rest_TE, iterations=60), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(("scale", "stops"), [(0.5, True), (20.0, False)])
def test_a_tolerance_ends_the_iteration_at_the_next_look(scale: float, stops: bool) -> None:
    cost_TE, iterations = cost(64, scale=scale), 3 * CHECK_EVERY
    with Waits() as waits:
        v_E = sinkhorn(cost_TE, iterations, tolerance=1e-3)
    early_E = sinkhorn(cost_TE, CHECK_EVERY)
    assert (column_error((cost_TE + early_E).softmax(-1)) < 1e-3) == stops
    torch.testing.assert_close(v_E, early_E if stops else sinkhorn(cost_TE, iterations))
    assert waits.count == (1 if stops else 2)


def test_a_fixed_number_of_iterations_never_waits_for_the_device() -> None:
    cost_TE, mask_T = cost(64), torch.arange(64) != 3
    with Waits() as waits:
        v_E = sinkhorn(cost_TE, 50, mask_T)
        column_error((cost_TE + v_E).softmax(-1), mask_T)
    assert waits.count == 0
    with Waits() as waits:
        float(v_E[0])
    assert waits.count == 1  # it would have been seen


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_column_error(masked: bool) -> None:
    prob_TE, mask_T = cost().softmax(-1), torch.arange(T) % 3 != 0
    rows = prob_TE[mask_T] if masked else prob_TE
    want = max(abs(sum(row[i].item() for row in rows) / (len(rows) / E) - 1) for i in range(E))
    assert column_error(prob_TE, mask_T if masked else None).item() == pytest.approx(want)


def test_precision_is_kept() -> None:
    assert sinkhorn(cost().float(), 3).dtype == torch.float32
    assert sinkhorn(cost(), 3).dtype == torch.float64


@pytest.mark.parametrize("given", [{"iterations": 0}, {"tolerance": 0.0}, {"tolerance": -1e-3}])
def test_impossible_options_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        TransportOptions(**given)


def test_local_marginals_need_no_group() -> None:
    context = dataclasses.replace(RoutingContext(), group="all ranks")  # type: ignore[arg-type]
    assert TransportOptions().group(context) is None
    assert TransportOptions(marginals="global").group(context) == "all ranks"


def test_the_reference_converges() -> None:
    """A check of the reference itself: after many rounds it meets both marginals."""
    plan_TE = exact.plan(cost(), 1.0, 60)
    torch.testing.assert_close(plan_TE.sum(0), torch.full((E,), T / E, dtype=torch.float64))
    assert math.isclose(plan_TE.sum().item(), T)
