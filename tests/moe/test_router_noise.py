"""Shazeer's noise and Switch's jitter: their law, their repeatability, their absence in evaluation.

With combine=sigmoid and every expert chosen, the weights are the sigmoids of all (noisy) logits: the
logits can be read off the router's answer.

Legend: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import RoutingContext
from tests.moe import reference

D, E = 4, 4


def router(k: int = E, **options: Any) -> Router:
    cls = ROUTERS["topk"]
    made = cls(D, E, k, cls.Options(**{"combine": "sigmoid", "balance_loss": 0.0, **options})).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def seen_logits(made: Router, hidden_TD: Tensor, context: RoutingContext | None = None) -> Tensor:
    routing = made(hidden_TD, context or RoutingContext())
    weight_TE = torch.zeros(len(hidden_TD), E, dtype=torch.float64)
    weight_TE[routing.token_N, routing.expert_N] = routing.weight_N.detach().double()
    return weight_TE.logit()


def test_shazeer_noise_is_normal_with_a_learned_deviation() -> None:
    draws, made = 20_000, router(noise="shazeer")
    x_D = torch.randn(D, dtype=torch.float64)
    noisy_TE = seen_logits(made, x_D.repeat(draws, 1))
    clean_E = made.scores.weight.detach() @ x_D
    std_E = torch.log1p(torch.exp(made.noise_scores.weight.detach() @ x_D)) + 0.01
    normal_TE = (noisy_TE - clean_E) / std_E
    for e in range(E):
        assert reference.ks_distance_to_normal(normal_TE[:, e]) < 1.95 / draws**0.5  # p = 0.001
    correlation = torch.corrcoef(normal_TE.T) - torch.eye(E)
    assert correlation.abs().max() < 0.03  # independent between experts
    following = (normal_TE[1:] * normal_TE[:-1]).mean(0)
    assert following.abs().max() < 0.03  # and between tokens


def test_shazeer_gradients_and_losses_equal_the_equations() -> None:
    """Everything that follows from the noisy logits, once the draw is known."""
    k, tokens = 2, 9
    options = {"combine": "softmax_then_topk", "noise": "shazeer", "balance_loss": 0.2, "z_loss": 0.1}
    made = router(k, **options, importance_loss=0.3, load_loss=0.4)
    hidden_TD = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    twin = router(E, noise="shazeer")
    twin.load_state_dict(made.state_dict())
    noisy_TE = seen_logits(twin, hidden_TD)

    raw_TE = hidden_TD @ made.noise_scores.weight.T
    std_TE = torch.log1p(torch.exp(raw_TE)) + 0.01
    clean_TE = hidden_TD @ made.scores.weight.T
    draw_TE = ((noisy_TE - clean_TE) / std_TE).detach()
    logits_TE = clean_TE + std_TE * draw_TE
    choices = [reference.choose(row, k) for row in logits_TE]
    want = {
        "balance_loss": 0.2 * reference.balance(logits_TE, choices, "switch"),
        "z_loss": 0.1 * reference.z_loss(clean_TE),
        "importance_loss": 0.3 * reference.importance(choices, E),
        "load_loss": 0.4 * reference.smooth_load(clean_TE, logits_TE, std_TE, k),
        "weight": torch.stack([w for chosen in choices for _, w in chosen]).square().sum(),
    }
    routing = made(hidden_TD, RoutingContext())
    got = {**routing.losses, "weight": routing.weight_N.square().sum()}
    assert routing.expert_N.tolist() == [e for chosen in choices for e, _ in chosen]
    assert set(got) == set(want)
    inputs = [hidden_TD, made.scores.weight, made.noise_scores.weight]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
        pairs = [
            torch.autograd.grad(v, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            for v in (got[name], value)
        ]
        for left, right in zip(*pairs, strict=True):
            torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}")


def test_jitter_multiplies_the_routers_input() -> None:
    tokens, width = 5000, 0.2
    made = router(noise="jitter", jitter=width)
    with torch.no_grad():
        made.scores.weight.copy_(torch.eye(E))  # the logits are the jittered input itself
    hidden_TD = torch.rand(tokens, D, dtype=torch.float64) + 0.5
    factor_TE = seen_logits(made, hidden_TD) / hidden_TD
    assert factor_TE.min() >= 1 - width - 1e-9
    assert factor_TE.max() <= 1 + width + 1e-9
    uniform = ((factor_TE.flatten() - 1) / (2 * width) + 0.5).clamp(1e-12, 1 - 1e-12)
    assert reference.ks_distance_to_normal(torch.special.ndtri(uniform)) < 1.95 / uniform.numel() ** 0.5


@pytest.mark.parametrize("noise", ["shazeer", "jitter"])
def test_noise_repeats_for_the_same_context_only(noise: str) -> None:
    made, hidden_TD = router(noise=noise, jitter=0.3), torch.randn(20, D, dtype=torch.float64)
    context = RoutingContext(seed=1, step=2, microbatch=3, layer=4)
    drawn = seen_logits(made, hidden_TD, context)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(drawn, seen_logits(made, hidden_TD, context))
    others = [replace(context, **{key: 7}) for key in ("seed", "step", "microbatch", "layer")]
    for other in (*others, context.for_copy()):
        assert not torch.isclose(drawn, seen_logits(made, hidden_TD, other)).any(-1).all()


def test_contexts_do_not_collide() -> None:
    """(1, 11) and (11, 1) and the like are different keys."""
    contexts = [
        RoutingContext(seed=a, step=b, microbatch=c, layer=d)
        for a in (1, 11) for b in (1, 11) for c in (1, 11) for d in (1, 11)
    ]  # fmt: skip
    generators = [c.generator(torch.device("cpu"), purpose) for c in contexts for purpose in ("noise", "router noise")]
    assert len({torch.rand(1, generator=g, dtype=torch.float64).item() for g in generators}) == len(generators)


@pytest.mark.parametrize("noise", ["shazeer", "jitter"])
def test_evaluation_is_clean(noise: str) -> None:
    made, hidden_TD = router(noise=noise, jitter=0.3).eval(), torch.randn(20, D, dtype=torch.float64)
    torch.testing.assert_close(seen_logits(made, hidden_TD), hidden_TD @ made.scores.weight.detach().T)
    assert not made(hidden_TD, RoutingContext()).losses


def test_all_experts_begin_equally_noisy() -> None:
    """W_noise starts at zero: softplus(0) + 0.01 for every expert and token."""
    made = router(noise="shazeer")
    made.noise_scores.reset_parameters(0.02)
    assert not made.noise_scores.weight.any()


def test_load_loss_needs_the_noise_that_defines_it() -> None:
    with pytest.raises(ValueError, match="noise=shazeer"):
        ROUTERS["topk"].Options(load_loss=0.1)


def test_load_loss_at_every_expert_is_refused_before_training() -> None:
    """With k = E the load is constant; saying so at construction saves a queue's wait."""
    with pytest.raises(ValueError, match="below the number of experts"):
        router(E, noise="shazeer", load_loss=0.1)


def test_jitter_of_a_half_precision_model_is_not_rounded_to_a_few_values() -> None:
    """bfloat16 has next to no numbers within 1 % of 1: the input has to become float32 before the jitter."""
    made = router(noise="jitter", jitter=0.01).bfloat16()
    with torch.no_grad():
        made.scores.weight.copy_(torch.eye(E))
    factor_TE = seen_logits(made, torch.ones(500, D, dtype=torch.bfloat16))
    assert len(factor_TE.unique()) > 1000
    assert abs(factor_TE.mean().item() - 1) < 1e-3
