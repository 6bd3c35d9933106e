"""BASE layers: equal shares in training, the best expert in evaluation, a sigmoid gate in both.

The assignment itself is compared with the exact optimum in test_auction.py.

Legend: T tokens, D model, E experts, N assignments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import build_layer
from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import RoutingContext
from tests.moe import reference
from tests.moe import transport_reference as exact

T, D, E = 11, 6, 4


def router(k: int = 1, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["base"]
    made = cls(D, E, k, cls.Options(**options)).double()
    torch.nn.init.normal_(made.scores.weight)
    return made.train(train)


def hidden(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("tokens", [T, 12, 3])
def test_training_takes_the_best_equal_shares(tokens: int, masked: bool) -> None:
    made, hidden_TD = router(epsilon=1e-5), hidden(tokens)
    mask_T = torch.arange(tokens) % 4 != 1
    routing = made(hidden_TD, RoutingContext(mask_T=mask_T if masked else None))
    real_T = mask_T if masked else torch.ones_like(mask_T)
    score_TE = torch.stack([made.scores.weight @ x for x in hidden_TD])
    chosen_T = score_TE[torch.arange(tokens), routing.expert_N]
    # So small a step finds the optimum itself, but for a tie.
    assert chosen_T[real_T].sum().item() == pytest.approx(exact.best_sum(score_TE[real_T].detach()), abs=1e-9)
    real = int(real_T.sum())
    assert sorted(routing.load_E.tolist()) == sorted(real // E + (e < real % E) for e in range(E))
    assert (routing.choices, routing.num_tokens, len(routing.token_N)) == (1, tokens, tokens)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_weights_and_gradients_equal_the_equations(train: bool, masked: bool) -> None:
    made, hidden_TD = router(train=train), hidden()
    routing = made(hidden_TD, RoutingContext(mask_T=torch.arange(T) % 4 != 1 if masked else None))
    scores = [made.scores.weight @ x for x in hidden_TD]
    if not train:
        assert routing.expert_N.tolist() == [reference.best(score_E, 1)[0] for score_E in scores]
    want_N = torch.stack(
        [1 / (1 + torch.exp(-score_E[e])) for score_E, e in zip(scores, routing.expert_N.tolist(), strict=True)]
    )
    torch.testing.assert_close(routing.weight_N, want_N)
    assert not routing.losses
    direction_N = torch.randn_like(want_N)
    inputs = [hidden_TD, made.scores.weight]
    for got, right in zip(
        torch.autograd.grad((routing.weight_N * direction_N).sum(), inputs),
        torch.autograd.grad((want_N * direction_N).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, right)
        assert got.norm() > 1e-3


def test_the_papers_output_is_the_residual_stream_plus_ours() -> None:
    """σ Exp(h) + (1 − σ) h with Exp(h) = h + expert(h)."""
    config = resolve_moe({"method": "base", "num_experts": E, "expert_hidden": 5})
    layer = build_layer(config, D, 0).double().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    hidden_BSD = torch.randn(1, 8, D, dtype=torch.float64)
    mixed_BSD, statistics = layer(hidden_BSD)
    assert statistics.counts_E.tolist() == [2] * E
    chosen = layer.router(hidden_BSD[0], RoutingContext()).expert_N.tolist()
    weights = layer.experts.w1, layer.experts.w2, layer.experts.w3
    for x_D, y_D, e in zip(hidden_BSD[0], mixed_BSD[0], chosen, strict=True):
        expert = reference.expert_mlp(x_D, *(w[e] for w in weights), config.expert_form, config.activation)
        gate = 1 / (1 + torch.exp(-(layer.router.scores.weight[e] @ x_D)))
        torch.testing.assert_close(x_D + y_D, gate * (x_D + expert) + (1 - gate) * x_D)


def test_a_collapsed_router_is_balanced_in_training_only() -> None:
    made = router()
    with torch.no_grad():
        made.scores.weight[2] += 2.0
    hidden_TD = hidden(512).detach() + 1
    assert made(hidden_TD, RoutingContext()).load_E.tolist() == [128] * E
    assert made.eval()(hidden_TD, RoutingContext()).load_E.max() > 0.9 * 512


def test_evaluation_is_each_tokens_own_and_training_is_not() -> None:
    made, hidden_TD = router(train=False), hidden(32)
    changed_TD = hidden_TD.detach().clone()
    changed_TD[16:] = hidden_TD[:1].detach()
    for train in (False, True):
        made.train(train)
        first, second = (made(x, RoutingContext()).expert_N[:16] for x in (hidden_TD, changed_TD))
        assert torch.equal(first, second) != train


@pytest.mark.parametrize("k", [2, 3, E])
def test_an_evaluation_may_take_more_experts(k: int) -> None:
    made, hidden_TD = router(train=False), hidden()
    routing = made(hidden_TD, RoutingContext(experts_per_token=k))
    scores = [made.scores.weight @ x for x in hidden_TD]
    want = [(e, score_E[e].sigmoid()) for score_E in scores for e in reference.best(score_E, k)]
    assert routing.expert_N.tolist() == [e for e, _ in want]
    torch.testing.assert_close(routing.weight_N, torch.stack([w for _, w in want]))
    with pytest.raises(ValueError, match="evaluation"):
        made.train()(hidden_TD, RoutingContext(experts_per_token=k))


def test_figures_of_the_auction() -> None:
    hidden_TD = hidden(64)
    stats = router(epsilon=0.01)(hidden_TD, RoutingContext()).stats
    assert stats["assignment_completed"] == 0
    assert stats["auction_rounds"] >= 1
    assert 0 <= stats["assignment_gap"] < 0.05
    hurried = router(max_rounds=1)(hidden_TD, RoutingContext())
    assert hurried.stats.keys() == stats.keys()
    assert hurried.stats["auction_rounds"] == 1
    assert hurried.load_E.tolist() == [16] * E
    assert all(value.dim() == 0 and not value.requires_grad for value in hurried.stats.values())
    assert hurried.stats["assignment_gap"].dtype == torch.float32


@pytest.mark.parametrize("k", [2, E])
def test_more_than_one_expert_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="experts_per_token=1"):
        router(k)


@pytest.mark.parametrize("given", [{"epsilon": 0.0}, {"epsilon": 1e-9}, {"epsilon": 2.0}, {"max_rounds": 0}], ids=str)
def test_impossible_options_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        router(**given)


def test_float32_whatever_the_models_dtype() -> None:
    made, hidden_TD = router().bfloat16(), hidden(64).detach().bfloat16()
    routing = made(hidden_TD, RoutingContext())
    assert routing.weight_N.dtype == torch.float32
    assert routing.load_E.tolist() == [16] * E
    score_TE = hidden_TD.float() @ made.scores.weight.float().T
    torch.testing.assert_close(routing.weight_N, score_TE[torch.arange(64), routing.expert_N].sigmoid())


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_nothing_but_padding(tokens: int) -> None:
    made, hidden_TD = router(), hidden(tokens)
    for mask_T in (None, torch.zeros(tokens, dtype=torch.bool)):
        routing = made(hidden_TD, RoutingContext(mask_T=mask_T))
        assert routing.counts_E.sum() == tokens
        assert routing.load_E.sum() == (tokens if mask_T is None else 0)
        assert torch.isfinite(routing.stats["assignment_gap"])
