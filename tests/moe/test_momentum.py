"""MomentumSMoE's update against the equations, one token and one layer at a time, and against torch's optimisers.

Legend: B batch, S sequence, D model, L SMoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.config import resolve_moe
from s2moe.moe.momentum import MomentumOptions, MomentumState, build_momentum, coefficients
from tests.moe.momentum_reference import Reference

B, S, D = 2, 3, 4
SPARSE = [False, True, False, True, True, True]  # of six layers the first and the third are dense

CASES: dict[str, dict[str, Any]] = {
    "heavy_ball": {"kind": "heavy_ball"},
    "heavy_ball with other constants": {"kind": "heavy_ball", "mu": 0.3, "gamma": 0.4},
    "negative": {"kind": "negative", "mu": 0.5, "gamma": 0.8},
    "nag": {"kind": "nag", "gamma": 0.6},
    "robust": {"kind": "robust"},
    "robust with other constants": {"kind": "robust", "rho": 0.55, "condition": 4.0, "smoothness": 2.5},
    "adam": {"kind": "adam"},
    "adam with other constants": {"kind": "adam", "gamma_adaptive": 0.2, "mu": 0.4, "beta1": 0.5, "epsilon": 0.1},
    "adam in all layers": {"kind": "adam", "adam_layers": "all", "beta2": 0.8},
    "adam with correction": {"kind": "adam", "adam_layers": "all", "bias_correction": True},
    "adam with decay": {"kind": "adam", "decay": 1.0},
    "rms": {"kind": "rms"},
    "rms without correction": {"kind": "rms", "bias_correction": False, "beta2": 0.6, "decay": 0.1},
    "subtracted": {"kind": "nag", "sign": "subtract"},
    "subtracted adam": {"kind": "adam", "sign": "subtract", "decay": 0.3},
    "none subtracted": {"kind": "none", "sign": "subtract"},
}
EVERY_CASE = pytest.mark.parametrize("given", CASES.values(), ids=CASES)


def mixture(weight_DD: Tensor, y: Tensor) -> Tensor:
    """Stands for norm, router and experts: any function of a token's hidden state."""
    return torch.tanh(y @ weight_DD.T) * y.square().mean(-1, keepdim=True).sqrt()


@EVERY_CASE
def test_every_kind_equals_its_equations(given: dict[str, Any]) -> None:
    """Forward and gradients through six layers, in which attention changes the residual stream as well."""
    weight_LDD = torch.randn(len(SPARSE), D, D, dtype=torch.float64, requires_grad=True)
    attention_LDD = torch.randn(len(SPARSE), D, D, dtype=torch.float64)
    start_BSD = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)

    options, hidden_BSD, state = MomentumOptions(**given), start_BSD, None
    for number, sparse in enumerate(SPARSE):
        hidden_BSD = hidden_BSD + 0.3 * torch.sin(hidden_BSD @ attention_LDD[number].T)
        if not sparse:  # a dense layer touches the residual stream alone
            hidden_BSD = hidden_BSD + mixture(weight_LDD[number], hidden_BSD)
            continue
        update = build_momentum(options, sum(SPARSE[:number]))
        mixed_BSD = mixture(weight_LDD[number], update.look_ahead(hidden_BSD, state))
        step_BSD, state = update.step(hidden_BSD, mixed_BSD, state)
        hidden_BSD = hidden_BSD + step_BSD

    def one_token(x_D: Tensor) -> Tensor:
        reference = Reference(options)
        for number, sparse in enumerate(SPARSE):
            x_D = x_D + 0.3 * torch.sin(attention_LDD[number] @ x_D)

            def u(y_D: Tensor, number: int = number) -> Tensor:
                return torch.tanh(weight_LDD[number] @ y_D) * (y_D @ y_D / D) ** 0.5

            x_D = reference.layer(x_D, u) if sparse else x_D + u(x_D)
        return x_D

    want_BSD = torch.stack([torch.stack([one_token(x_D) for x_D in x_SD]) for x_SD in start_BSD])
    torch.testing.assert_close(hidden_BSD, want_BSD)
    direction_BSD = torch.randn_like(want_BSD)
    pairs = [
        torch.autograd.grad((value * direction_BSD).sum(), (start_BSD, weight_LDD)) for value in (hidden_BSD, want_BSD)
    ]
    for got, want in zip(*pairs, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want)


def descend(given: dict[str, Any], steps: int, gradient: Callable[[Tensor], Tensor], start: Tensor) -> list[Tensor]:
    """The points of a descent whose every step is an SMoE layer with u(y) = −gradient(y)."""
    options, hidden, state, points = MomentumOptions(**given), start, None, []
    for position in range(steps):
        update = build_momentum(options, position)
        step, state = update.step(hidden, -gradient(update.look_ahead(hidden, state)), state)
        hidden = hidden + step
        points.append(hidden)
    return points


@pytest.mark.parametrize(
    ("given", "make"),
    [
        ({"kind": "heavy_ball", "gamma": 0.05}, lambda x: torch.optim.SGD(x, lr=0.05, momentum=0.7)),
        (
            {"kind": "adam", "adam_layers": "all", "bias_correction": True, "gamma_adaptive": 0.1, "epsilon": 1e-30},
            lambda x: torch.optim.Adam(x, lr=0.1, eps=0.0),
        ),
        (
            {"kind": "rms", "bias_correction": False, "beta2": 0.9, "gamma_adaptive": 0.1, "epsilon": 1e-30},
            lambda x: torch.optim.RMSprop(x, lr=0.1, alpha=0.9, eps=0.0),
        ),
    ],
    ids=["heavy_ball", "adam", "rms"],
)
def test_on_a_quadratic_they_are_torchs_optimisers(given: dict[str, Any], make: Any) -> None:
    curvature = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
    start = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    parameter = start.clone().requires_grad_()
    optimizer = make([parameter])
    for point in descend(given, 8, lambda x: curvature * x, start):
        optimizer.zero_grad()
        (curvature * parameter**2 / 2).sum().backward()
        optimizer.step()
        torch.testing.assert_close(point, parameter.detach())


def test_nag_is_nesterovs_method() -> None:
    """y = x + μ (x − x_before), x ← y − γ ∇(y), with neither p nor torch's rearrangement of it."""
    curvature, mu, gamma = torch.tensor([1.0, 7.0], dtype=torch.float64), 0.7, 0.1
    start = torch.tensor([2.0, -1.0], dtype=torch.float64)
    before = here = start
    for point in descend({"kind": "nag", "mu": mu, "gamma": gamma}, 8, lambda x: curvature * x, start):
        ahead = here + mu * (here - before)
        before, here = here, ahead - gamma * curvature * ahead
        torch.testing.assert_close(point, here)


def test_robust_momentum_is_gradient_descent_at_its_steady_end() -> None:
    """ρ = 1 − 1/κ: the points y, where the gradient is taken, are those of gradient descent with step 1/L."""
    smoothness, condition = 5.0, 8.0
    given = {"kind": "robust", "rho": 1 - 1 / condition, "condition": condition, "smoothness": smoothness}
    curvature = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    plain, seen = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64), []
    descend(given, 8, lambda y: seen.append(y) or curvature * y, plain)
    for point in seen:
        torch.testing.assert_close(point, plain)
        plain = plain - curvature * plain / smoothness


def test_robust_momentum_converges_at_its_rate() -> None:
    """On a quadratic with curvatures from m to L the distance falls as ρ^t, whatever ρ in its interval."""
    condition, smoothness, steps = 16.0, 2.0, 60
    curvature = torch.linspace(smoothness / condition, smoothness, 9, dtype=torch.float64)
    for rho in (1 - condition**-0.5, 0.85, 1 - 1 / condition):
        given = {"kind": "robust", "rho": rho, "condition": condition, "smoothness": smoothness}
        points = descend(given, steps, lambda y: curvature * y, torch.ones(9, dtype=torch.float64))
        assert points[-1].norm() < 100 * steps * rho**steps


def test_constants_of_the_robust_kind() -> None:
    """κ = 10, ρ = 0.8, L = 1, by hand: (1 − ρ)² (1 + ρ) = 0.072."""
    mu, gamma, alpha = coefficients(MomentumOptions(kind="robust"))
    assert mu == pytest.approx(5.12 / 9)
    assert gamma == pytest.approx(0.72)
    assert alpha == pytest.approx(0.512 / (9 * 0.072))


def test_the_state_is_float32_in_half_precision() -> None:
    """Squares of 2⁻¹³ lie below float16's range; sums of small steps vanish in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        hidden, small = torch.ones(2, dtype=dtype), torch.full((2,), 2.0**-13, dtype=dtype)
        for given in CASES.values():
            update, state = build_momentum(MomentumOptions(**given), 0), None
            for _ in range(3):
                assert update.look_ahead(hidden, state).dtype == dtype
                step, state = update.step(hidden, small, state)
                assert step.dtype == dtype
            assert all(tensor is None or tensor.dtype == torch.float32 for tensor in state or ())
        update = build_momentum(MomentumOptions(kind="rms", epsilon=1e-12), 0)
        step, state = update.step(hidden, small, None)
        torch.testing.assert_close(state.square_BSD, torch.full((2,), 0.001 * 2.0**-26))
        torch.testing.assert_close(step.float(), torch.ones(2), rtol=1e-2, atol=0)


@EVERY_CASE
def test_zeros_and_no_state_are_the_same_start(given: dict[str, Any]) -> None:
    update = build_momentum(MomentumOptions(**given), 0)
    hidden, mixed = torch.randn(2, 3, 4).double()
    zeros = MomentumState(torch.zeros_like(hidden), torch.zeros_like(hidden))
    assert torch.equal(update.look_ahead(hidden, zeros), update.look_ahead(hidden, None))
    assert torch.equal(update.step(hidden, mixed, zeros)[0], update.step(hidden, mixed, None)[0])


def test_only_the_plain_residual_needs_no_update() -> None:
    assert build_momentum(MomentumOptions(), 0) is None
    assert build_momentum(MomentumOptions(mu=0.2, rho=0.7), 0) is None  # of kinds that are not in use
    assert build_momentum(MomentumOptions(legacy_double_residual=True), 0) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "polyak"}, r"momentum.kind: must be one of none, heavy_ball"),
        ({"mu": -0.5}, r"mu must lie in \[0, 1\), got -0.5; for a negative momentum set kind=negative"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\)"),
        ({"gamma": 0.0}, r"gamma must be positive"),
        ({"epsilon": 0.0}, r"epsilon must be positive"),
        ({"decay": -0.1}, r"decay must not be negative"),
        ({"kind": "robust", "rho": 0.95}, r"rho must lie in \[0.6838, 0.9\] for condition=10, got 0.95"),
        ({"kind": "robust", "rho": 0.5}, r"rho must lie in"),
        ({"kind": "robust", "condition": 1.0}, r"condition must be above 1"),
        ({"bias_corection": True}, r"momentum: unknown key 'bias_corection', did you mean 'bias_correction'"),
    ],
    ids=str,
)
def test_errors_name_the_key_and_the_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_moe({"momentum": given})


@pytest.mark.parametrize(
    ("method", "kind"),
    [("momentum_smoe", "heavy_ball"), ("adam_smoe", "adam"), ("robust_momentum_smoe", "robust"), ("smoe", "none")],
)
def test_presets(method: str, kind: str) -> None:
    config = resolve_moe({"method": method})
    assert config.momentum.kind == kind
    assert (config.momentum.mu, config.momentum.gamma) == (0.7, 1.0)
