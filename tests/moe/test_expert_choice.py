"""Expert Choice against its equations, one expert at a time: scores, chosen tokens, thresholds, causality.

Legend: B sequences, S tokens of each, T = B S tokens, D model, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import RoutingContext
from tests.methods.test_conformance import trained
from tests.models.test_causality import assert_causal
from tests.moe import reference
from tests.moe.test_layer import assert_same_gradients, experts, layer
from tests.moe.test_usmoe import (
    MASK_BS,
    B,
    D,
    E,
    Pair,
    S,
    T,
    assert_causal_often,
    assert_pairs,
    context,
    groups,
    hidden,
)


def router(k: int = 2, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["expert_choice"]
    made = cls(D, E, k, cls.Options(**options)).double()
    torch.nn.init.normal_(made.scores.weight)
    return made.train(train)


def score(logits_E: Tensor, kind: str = "softmax") -> Tensor:
    return reference.normalise_exp(logits_E) if kind == "softmax" else 1 / (1 + torch.exp(-logits_E))


def taken(scores: list[Tensor], scope: str, budget: float, masked: bool) -> list[Pair]:
    """Each expert takes the ceil(n · budget / E) tokens of each group that it likes best."""
    pairs = []
    experts_E = len(scores[0])
    for tokens in groups(scope, masked):
        for e in range(experts_E):
            best = sorted(tokens, key=lambda t, e=e: -scores[t][e].item())
            pairs += [(t, e) for t in best[: math.ceil(len(tokens) * budget / experts_E)]]
    return sorted(pairs)


def at_most(pairs: list[Pair], scores: list[Tensor], most: int | None) -> list[Pair]:
    """Each token keeps its ``most`` best of the experts it has."""
    kept = []
    for t in sorted({t for t, _ in pairs}):
        own = sorted((e for u, e in pairs if u == t), key=lambda e, t=t: -scores[t][e].item())
        kept += [(t, e) for e in sorted(own[:most])]
    return kept


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("scope", ["token_batch", "sequence"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("k", "budget", "most"),
    [(1, None, None), (2, None, None), (E, None, None), (2, 1.5, None), (3, None, 2), (2, 3, 1)],
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_pairs_and_weights_equal_the_equations(
    scope: str, kind: str, k: int, budget: float | None, most: int | None, masked: bool, train: bool
) -> None:
    """In evaluation with ``inference=scope`` as in training."""
    made = router(k, train, scope=scope, score=kind, budget=budget, max_experts_per_token=most, inference="scope")
    hidden_TD = hidden()
    scores = [score(made.scores.weight @ x, kind) for x in hidden_TD]
    pairs = at_most(taken(scores, scope, budget or k, masked), scores, most)
    routing = made(hidden_TD, context(masked))
    assert_pairs(routing, pairs, [scores[t][e] for t, e in pairs], [hidden_TD, made.scores.weight])
    assert not routing.losses
    if most is None:
        quota = sum(math.ceil(len(tokens) * (budget or k) / E) for tokens in groups(scope, masked))
        assert routing.counts_E.tolist() == [quota] * E  # balanced, whatever the router


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("k", "own", "most"), [(1, 1, None), (2, None, None), (2, 4, 2), (2, E, None), (3, None, 1)])
def test_inference_takes_what_reaches_each_experts_threshold(
    k: int, own: int | None, most: int | None, kind: str, masked: bool
) -> None:
    made = router(k, scope="sequence", score=kind, max_experts_per_token=most)
    learnt_TD, hidden_TD = hidden().detach(), hidden()
    made.after_step(made(learnt_TD, context(masked)).feedback)
    scores, budget = [score(made.scores.weight @ x, kind) for x in learnt_TD], own or k
    parts = groups("sequence", masked)
    threshold = [0.0] * E  # mean over tokens of the score of the last token that each expert took of their sequence
    for tokens in parts:
        for e in range(E):
            ranked = sorted((scores[t][e].item() for t in tokens), reverse=True)
            cutoff = ranked[math.ceil(len(tokens) * budget / E) - 1]
            threshold[e] += cutoff * len(tokens) / sum(map(len, parts))
    if budget == E:
        threshold = [-math.inf] * E

    made.eval()
    scores = [score(made.scores.weight @ x, kind) for x in hidden_TD]
    real = [t for t in range(T) if MASK_BS.reshape(-1)[t] or not masked]
    pairs = at_most([(t, e) for t in real for e in range(E) if scores[t][e].item() >= threshold[e]], scores, most)
    routing = made(hidden_TD, context(masked, experts_per_token=own))
    assert_pairs(routing, pairs, [scores[t][e] for t, e in pairs], [hidden_TD, made.scores.weight])
    assert routing.feedback is None


@pytest.mark.parametrize(("inference", "trains"), [("topk", True), ("topk", False), ("threshold", False)])
@pytest.mark.parametrize(("budget", "most", "want"), [(1, None, 1), (1.5, None, 2), (3, 2, 2), (E, None, E)])
def test_token_by_token_inference(inference: str, trains: bool, budget: float, most: int | None, want: int) -> None:
    """``topk``, and what ``threshold`` does before there is one: each token's ceil(budget) best."""
    made, hidden_TD = router(2, budget=budget, inference=inference, max_experts_per_token=most), hidden()
    if trains:
        made.after_step(made(hidden().detach(), context()).feedback)
    routing = made.eval()(hidden_TD, context())
    scores = [score(made.scores.weight @ x) for x in hidden_TD]
    pairs = [(t, e) for t in range(T) for e in sorted(reference.best(scores[t], want))]
    assert_pairs(routing, pairs, [scores[t][e] for t, e in pairs], [hidden_TD, made.scores.weight])


def test_any_number_of_experts_without_thresholds_and_named_ones_with() -> None:
    for inference in ("topk", "scope"):
        routing = router(2, train=False, inference=inference)(hidden(), context(experts_per_token=3))
        assert routing.counts_E.sum().item() == pytest.approx(3 * T, abs=E - 1)
    with pytest.raises(ValueError, match="3 experts per token: choose one of 1, 2, 4, 5"):
        router(2, train=False)(hidden(), context(experts_per_token=3))


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_the_layer_equals_the_dense_mixture(masked: bool) -> None:
    made = layer(method="expert_choice", experts_per_token=1)
    hidden_BSD = torch.randn(B, S, 8, dtype=torch.float64, requires_grad=True)
    out_BSD, statistics = made(hidden_BSD, RoutingContext(mask_T=MASK_BS.reshape(-1) if masked else None))
    x_TD = hidden_BSD.reshape(T, 8)
    scores = [score(made.router.scores.weight @ x) for x in x_TD]
    pairs = taken(scores, "token_batch", 1, masked)
    choices = [[(e, scores[t][e]) for u, e in pairs if u == t] for t in range(T)]
    assert any(not c for c in choices)
    assert any(len(c) > 1 for c in choices)
    want_TD = reference.mixture(x_TD, choices, experts(made), made.config.expert_form, "silu")
    torch.testing.assert_close(out_BSD, want_TD.view_as(out_BSD))
    assert statistics.loss.item() == 0
    direction_BSD = torch.randn_like(out_BSD)
    want = (want_TD.view_as(out_BSD) * direction_BSD).sum()
    assert_same_gradients((out_BSD * direction_BSD).sum(), want, made, hidden_BSD)


def test_padding_is_nobodys_rival() -> None:
    """Whatever stands in it, and in training."""
    made, hidden_TD, found = router(score="sigmoid"), hidden().detach(), []
    mask_T = MASK_BS.reshape(-1)
    for filling in (0.0, 7.0, -7.0):
        routing = made(torch.where(mask_T[:, None], hidden_TD, filling), context(masked=True))
        figures = {name: value.item() for name, value in routing.stats.items()}
        found.append((routing.token_N.tolist(), routing.expert_N.tolist(), routing.feedback.tolist(), figures))
        assert mask_T[routing.token_N].all()
    assert found[0] == found[1] == found[2]


def sees(made: Router, changed: int) -> set[int]:
    """Tokens whose experts or weights change with a token that expert 0 likes best in place of ``changed``."""
    hidden_TD = 0.1 * hidden().detach()

    def gates(h_TD: Tensor) -> Tensor:
        routing = made(h_TD, context())
        return torch.zeros(T, E, dtype=torch.float64).index_put((routing.token_N, routing.expert_N), routing.weight_N)

    before_TE = gates(hidden_TD)
    hidden_TD[changed] = 10 * made.scores.weight.detach()[0]
    return set((gates(hidden_TD) - before_TE).abs().amax(-1).gt(1e-9).nonzero().flatten().tolist())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_contest_is_not_causal_and_the_documentation_says_so(train: bool, kind: str) -> None:
    """The tokens that lose expert 0 to a later one stand before it, in its sequence or in any."""
    last = 2 * S - 1  # of the second sequence
    seen: set[int] = set()
    for _ in range(10):  # it may have been expert 0's all along
        found = sees(router(scope="sequence", train=train, inference="scope", score=kind), last)
        assert found <= {4, 5, 6, 7}
        seen |= found
    assert seen & {4, 5, 6}
    found = set().union(*(sees(router(train=train, inference="scope", score=kind), last) for _ in range(10)))
    assert found - {4, 5, 6, 7}


@pytest.mark.parametrize("inference", ["threshold", "topk"])
@pytest.mark.parametrize("scope", ["sequence", "token_batch"])
@pytest.mark.parametrize("most", [None, 1])
def test_inference_decides_each_token_on_its_own(inference: str, scope: str, most: int | None) -> None:
    made = router(scope=scope, inference=inference, max_experts_per_token=most)
    for _ in range(3):
        made.after_step(made(hidden().detach(), context()).feedback)
    made.eval()
    for token in range(T):
        assert sees(made, token) <= {token}
    hidden_TD = hidden().detach()
    whole = made(hidden_TD, context())
    for t in range(T):
        alone = made(hidden_TD[t : t + 1], RoutingContext())
        assert alone.expert_N.tolist() == whole.expert_N[whole.token_N == t].tolist()
        torch.testing.assert_close(alone.weight_N, whole.weight_N[whole.token_N == t])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_models_are_causal_in_evaluation(kind: str) -> None:
    moe = {"method": "expert_choice", "router": {"score": kind, "max_experts_per_token": 2}}
    for k in (None, 1, 2, 4):
        assert_causal(trained(moe, num_hidden_layers=2), experts_per_token=k)
    assert_causal(trained({**moe, "router": {**moe["router"], "inference": "topk"}}, num_hidden_layers=2))


@pytest.mark.parametrize("scope", ["sequence", "token_batch"])
def test_models_with_the_papers_inference_are_not(scope: str) -> None:
    model = trained({"method": "expert_choice", "router": {"scope": scope, "inference": "scope"}}, num_hidden_layers=2)
    with pytest.raises(AssertionError, match="saw a later token"):
        assert_causal_often(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1.0}, "budget must be positive and at most num_experts"),
        ({"budget": E + 0.5}, "budget must be positive and at most num_experts"),
        ({"threshold_decay": -0.1}, "threshold_decay"),
        ({"max_experts_per_token": 0}, "max_experts_per_token must lie in 1..5 or be null"),
        ({"max_experts_per_token": E + 1}, "max_experts_per_token must lie in 1..5 or be null"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(**options)


def test_float32_whatever_the_models_dtype() -> None:
    made = router().bfloat16()
    hidden_TD = hidden().detach().bfloat16()
    exact = router()
    exact.scores.weight.data.copy_(made.scores.weight)
    got, want = made(hidden_TD, context()), exact(hidden_TD.double(), context())
    assert got.weight_N.dtype == got.feedback.dtype == torch.float32
    assert got.expert_N.tolist() == want.expert_N.tolist()
    torch.testing.assert_close(got.weight_N.double(), want.weight_N, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "token_batch"])
def test_no_tokens_and_padding_alone(scope: str) -> None:
    routing = router(train=False)(torch.zeros(0, D, dtype=torch.float64), RoutingContext())
    assert len(routing.token_N) == routing.counts_E.sum() == 0
    routing = router(scope=scope)(hidden(), RoutingContext(sequences=B, mask_T=torch.zeros(T, dtype=torch.bool)))
    assert len(routing.token_N) == 0
    assert all(torch.isfinite(value) for value in routing.stats.values())
    assert not routing.feedback.any()


def test_router_learns_from_the_task_and_every_expert_is_used_however_skewed_it_is() -> None:
    made, hidden_TD = router(1), hidden().detach() + 1
    with torch.no_grad():
        made.scores.weight[2] += 3.0
    routing = made(hidden_TD, context())
    assert routing.counts_E.tolist() == [3] * E  # 12 tokens · 1 / 5 experts, rounded up
    (gradient,) = torch.autograd.grad((routing.weight_N * torch.randn(3 * E)).sum(), made.scores.weight)
    assert gradient.norm() > 1e-4
