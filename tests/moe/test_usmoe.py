"""USMoE against its equations, one pair at a time: scores, winners, thresholds, gradients, causality.

Legend: B sequences, S tokens of each, T = B S tokens, D model, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import Routing, RoutingContext
from tests.methods.test_conformance import trained
from tests.models.test_causality import assert_causal
from tests.moe import reference
from tests.moe.test_layer import assert_same_gradients, experts, layer
from tests.moe.test_topk_router import assert_same_gradients as same_gradients

B, S, D, E = 3, 4, 6, 5
T = B * S
MASK_BS = torch.tensor([[False, False, True, True], [True, True, True, True], [False, True, True, True]])
Pair = tuple[int, int]


def router(k: int = 2, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["usmoe"]
    made = cls(D, E, k, cls.Options(**options)).double()
    torch.nn.init.normal_(made.scores.weight)
    return made.train(train)


def hidden() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def token_with_logits(made: Router, value: float) -> Tensor:
    """A hidden state for which all logits are ``value``: a large one attracts every expert, a low one none."""
    return torch.linalg.pinv(made.scores.weight.detach()) @ torch.full((E,), value, dtype=torch.float64)


def context(masked: bool = False, **given: Any) -> RoutingContext:
    return RoutingContext(sequences=B, mask_T=MASK_BS.reshape(-1) if masked else None, **given)


def score(logits_E: Tensor, alpha: float = 0.5) -> Tensor:
    """(1 - alpha) softmax(L) + alpha (2 / E) sigmoid(L)."""
    return (1 - alpha) * reference.normalise_exp(logits_E) + alpha * 2 / len(logits_E) / (1 + torch.exp(-logits_E))


def groups(scope: str, masked: bool) -> list[list[int]]:
    """The real tokens that compete with each other."""
    real = [[t for t in range(S) if MASK_BS[b, t] or not masked] for b in range(B)]
    if scope == "sequence":
        return [[b * S + t for t in real[b]] for b in range(B)]
    if scope == "token_batch":
        return [[b * S + t for b in range(B) for t in real[b]]]
    return [[b * S + t for b in range(B) if t in real[b]] for t in range(S)]


def winners(scores: list[Tensor], scope: str, budget: float, masked: bool) -> list[Pair]:
    """The ceil(n · budget) best of the n E pairs in each group."""
    won = []
    for tokens in groups(scope, masked):
        pairs = sorted(((t, e) for t in tokens for e in range(E)), key=lambda pair: -scores[pair[0]][pair[1]].item())
        won += pairs[: math.ceil(len(tokens) * budget)]
    return sorted(won)


def assert_pairs(routing: Routing, pairs: list[Pair], weights: list[Tensor], inputs: list[Tensor]) -> None:
    """The routing is this list of pairs, with these weights, and the same gradient for the inputs."""
    assert list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)) == pairs
    assert routing.counts_E.tolist() == [sum(e == i for _, e in pairs) for i in range(E)]
    assert (routing.num_tokens, routing.choices) == (T, None)
    want_N = torch.stack(weights)
    torch.testing.assert_close(routing.weight_N, want_N)
    direction_N = torch.randn_like(want_N)
    same_gradients((routing.weight_N * direction_N).sum(), (want_N * direction_N).sum(), inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("scope", ["sequence", "token_batch", "time_step"])
@pytest.mark.parametrize(("k", "budget", "alpha"), [(1, None, 0.5), (2, None, 0.3), (E, None, 0.5), (2, 1.5, 0.7)])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_pairs_and_weights_equal_the_equations(
    scope: str, k: int, budget: float | None, alpha: float, masked: bool, train: bool
) -> None:
    """In evaluation with ``inference=scope`` as in training."""
    made = router(k, train, scope=scope, alpha=alpha, budget=budget, inference="scope")
    hidden_TD = hidden()
    scores = [score(made.scores.weight @ x, alpha) for x in hidden_TD]
    pairs = winners(scores, scope, budget or k, masked)
    routing = made(hidden_TD, context(masked))
    assert_pairs(routing, pairs, [scores[t][e] for t, e in pairs], [hidden_TD, made.scores.weight])
    assert not routing.losses


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("inference", ["threshold", "scope"])
def test_renormalised_weights_are_divided_by_the_chosen_ones_alone(inference: str, masked: bool) -> None:
    """Tokens without experts included, whose gradient has to stay finite."""
    for train in (True, False):
        made, hidden_TD = router(2, train, renormalise=True, inference=inference, budget=1.2), hidden()
        with torch.no_grad():
            hidden_TD[6] = token_with_logits(made, -20.0)
        made.after_step(made.train()(hidden_TD.detach(), context()).feedback)
        made.train(train)
        routing = made(hidden_TD, context(masked))
        scores = [score(made.scores.weight @ x) for x in hidden_TD]
        pairs = list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
        sums = [sum(scores[t][e] for u, e in pairs if u == t) for t in range(T)]
        assert sums[6] == 0
        assert_pairs(routing, pairs, [scores[t][e] / sums[t] for t, e in pairs], [hidden_TD, made.scores.weight])


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("k", "own"), [(1, 1), (2, None), (2, 1), (2, 4), (2, E), (3, None)])
def test_inference_takes_what_reaches_the_threshold(k: int, own: int | None, masked: bool) -> None:
    """The threshold of one step is the mean over its sequences of the last winner's score."""
    made = router(k)
    learnt_TD, hidden_TD = hidden().detach(), hidden()
    made.after_step(made(learnt_TD, context()).feedback)
    scores, budget, cutoffs = [score(made.scores.weight @ x) for x in learnt_TD], own or k, []
    for tokens in groups("sequence", masked=False):
        ranked = sorted((scores[t][e].item() for t in tokens for e in range(E)), reverse=True)
        cutoffs.append(ranked[budget * S - 1])
    threshold = -math.inf if budget == E else sum(cutoffs) / B

    made.eval()
    scores = [score(made.scores.weight @ x) for x in hidden_TD]
    real = [t for t in range(T) if MASK_BS.reshape(-1)[t] or not masked]
    pairs = [(t, e) for t in real for e in range(E) if scores[t][e].item() >= threshold]
    routing = made(hidden_TD, context(masked, experts_per_token=own))
    assert_pairs(routing, pairs, [scores[t][e] for t, e in pairs], [hidden_TD, made.scores.weight])
    assert routing.feedback is None
    assert routing.stats["experts_per_token"].item() == pytest.approx(len(pairs) / len(real))


@pytest.mark.parametrize(("inference", "trains"), [("topk", True), ("topk", False), ("threshold", False)])
@pytest.mark.parametrize(("budget", "most"), [(1, 1), (2, 2), (1.5, 2), (E, E)])
def test_token_by_token_inference(inference: str, trains: bool, budget: float, most: int) -> None:
    """``topk``, and what ``threshold`` does before there is one: each token's ceil(budget) best."""
    made, hidden_TD = router(2, budget=budget, inference=inference), hidden()
    if trains:
        made.after_step(made(hidden().detach(), context()).feedback)
    routing = made.eval()(hidden_TD, context())
    scores = [score(made.scores.weight @ x) for x in hidden_TD]
    pairs = [(t, e) for t in range(T) for e in sorted(reference.best(scores[t], most))]
    assert_pairs(routing, pairs, [scores[t][e] for t, e in pairs], [hidden_TD, made.scores.weight])


def test_any_number_of_experts_without_thresholds_and_named_ones_with() -> None:
    for inference in ("topk", "scope"):
        made = router(2, train=False, inference=inference)
        routing = made(hidden(), context(experts_per_token=3))
        assert routing.counts_E.sum().item() == 3 * T
    with pytest.raises(ValueError, match="3 experts per token: choose one of 1, 2, 4, 5"):
        router(2, train=False)(hidden(), context(experts_per_token=3))


def test_a_token_may_have_no_expert_and_another_all() -> None:
    made = router(budget=1.25)  # five pairs for the four tokens of a sequence
    hidden_TD = 0.1 * hidden().detach()  # scores of about 1 / E
    hidden_TD[1] = token_with_logits(made, 20.0)  # scores of 1.5 / E
    routing = made(hidden_TD, context())
    assert routing.token_N[routing.token_N < S].tolist() == [1] * E
    without = T - len(set(routing.token_N.tolist()))
    assert without >= 3
    assert routing.stats["tokens_without_expert"].item() == pytest.approx(without / T)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_the_layer_equals_the_dense_mixture(masked: bool) -> None:
    made = layer(method="usmoe", experts_per_token=1)
    hidden_BSD = torch.randn(B, S, 8, dtype=torch.float64, requires_grad=True)
    mask_T = MASK_BS.reshape(-1) if masked else None
    out_BSD, statistics = made(hidden_BSD, RoutingContext(mask_T=mask_T))
    x_TD, experts_E = hidden_BSD.reshape(T, 8), made.config.num_experts
    scores = [score(made.router.scores.weight @ x) for x in x_TD]
    choices: list[list[reference.Choice]] = [[] for _ in range(T)]
    for tokens in groups("sequence", masked):
        pairs = sorted(((t, e) for t in tokens for e in range(experts_E)), key=lambda p: -scores[p[0]][p[1]].item())
        for t, e in pairs[: len(tokens)]:
            choices[t].append((e, scores[t][e]))
    assert any(not c for c in choices)
    assert any(len(c) > 1 for c in choices)
    want_TD = reference.mixture(x_TD, choices, experts(made), made.config.expert_form, "silu")
    torch.testing.assert_close(out_BSD, want_TD.view_as(out_BSD))
    assert statistics.loss.item() == 0
    direction_BSD = torch.randn_like(out_BSD)
    want = (want_TD.view_as(out_BSD) * direction_BSD).sum()
    assert_same_gradients((out_BSD * direction_BSD).sum(), want, made, hidden_BSD)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_balance_and_z_loss_equal_the_equations(masked: bool) -> None:
    made, hidden_TD = router(2, balance_loss=0.3, z_loss=0.2), hidden()
    routing = made(hidden_TD, context(masked))
    logits_TE = torch.stack([made.scores.weight @ x for x in hidden_TD])
    pairs = winners([score(row) for row in logits_TE], "sequence", 2, masked)
    real = [t for t in range(T) if MASK_BS.reshape(-1)[t] or not masked]
    choices = [[(e, torch.ones(())) for u, e in pairs if u == t] for t in real]
    want = {
        "balance_loss": 0.3 * reference.balance(logits_TE[real], choices, "switch"),
        "z_loss": 0.2 * reference.z_loss(logits_TE[real]),
    }
    assert set(routing.losses) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(routing.losses[name], value)
        same_gradients(routing.losses[name], value, [hidden_TD, made.scores.weight])
    assert not router(2, train=False, balance_loss=0.3)(hidden(), context()).losses


def test_padding_is_nobodys_rival() -> None:
    """Whatever stands in it, and in training: real tokens' pairs, losses and thresholds are the same."""
    made, hidden_TD, found = router(balance_loss=0.1), hidden().detach(), []
    mask_T = MASK_BS.reshape(-1)
    for filling in (0.0, 7.0, -7.0):
        routing = made(torch.where(mask_T[:, None], hidden_TD, filling), context(masked=True))
        figures = {name: value.item() for name, value in routing.stats.items()}
        found.append((routing.token_N.tolist(), routing.expert_N.tolist(), routing.feedback.tolist(), figures))
        assert mask_T[routing.token_N].all()
    assert found[0] == found[1] == found[2]


def sees(made: Router, changed: int, **given: Any) -> set[int]:
    """Tokens whose experts or weights change with another, very attractive token in place of ``changed``."""
    hidden_TD = 0.1 * hidden().detach()  # scores of about 1 / E

    def gates(h_TD: Tensor) -> Tensor:
        routing = made(h_TD, context(**given))
        return torch.zeros(T, E, dtype=torch.float64).index_put((routing.token_N, routing.expert_N), routing.weight_N)

    before_TE = gates(hidden_TD)
    hidden_TD[changed] = token_with_logits(made, 20.0)
    return set((gates(hidden_TD) - before_TE).abs().amax(-1).gt(1e-9).nonzero().flatten().tolist())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_contest_is_not_causal_and_the_documentation_says_so(train: bool) -> None:
    """A sequence's last token pushes out earlier pairs; a time step's token those of other sequences, at that step."""
    last = 2 * S - 1  # of the second sequence
    options = {"train": train, "inference": "scope"}
    seen = sees(router(**options), last)
    assert seen & {4, 5, 6}
    assert seen <= {4, 5, 6, 7}
    seen = sees(router(scope="token_batch", **options), last)
    assert seen - {4, 5, 6, 7}
    seen = sees(router(scope="time_step", **options), last)
    assert seen & {3, 11}
    assert seen <= {3, 7, 11}


@pytest.mark.parametrize("inference", ["threshold", "topk"])
@pytest.mark.parametrize("scope", ["sequence", "token_batch", "time_step"])
def test_inference_decides_each_token_on_its_own(inference: str, scope: str) -> None:
    made = router(scope=scope, inference=inference)
    for _ in range(3):
        made.after_step(made(hidden().detach(), context()).feedback)
    made.eval()
    for token in range(T):
        assert sees(made, token) == {token}
    hidden_TD = hidden().detach()
    whole = made(hidden_TD, context())
    for t in range(T):
        alone = made(hidden_TD[t : t + 1], RoutingContext())
        assert alone.expert_N.tolist() == whole.expert_N[whole.token_N == t].tolist()
        torch.testing.assert_close(alone.weight_N, whole.weight_N[whole.token_N == t])


@pytest.mark.parametrize("scope", ["sequence", "time_step"])
def test_models_are_causal_in_evaluation(scope: str) -> None:
    moe = {"method": "usmoe", "router": {"scope": scope, "budget": 1.5}}
    for k in (None, 1, 2, 4):
        assert_causal(trained(moe, num_hidden_layers=2), experts_per_token=k)
    assert_causal(trained({**moe, "router": {**moe["router"], "inference": "topk"}}, num_hidden_layers=2))


def assert_causal_often(model: torch.nn.Module) -> None:
    """For many sequences: a change has to push out a pair before it is seen elsewhere."""
    for _ in range(20):
        assert_causal(model)


@pytest.mark.parametrize("scope", ["sequence", "token_batch", "time_step"])
def test_models_with_published_inference_are_not(scope: str) -> None:
    model = trained({"method": "usmoe", "router": {"scope": scope, "inference": "scope"}}, num_hidden_layers=2)
    with pytest.raises(AssertionError, match="saw another one" if scope == "time_step" else "saw a later token"):
        assert_causal_often(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"budget": 0.0}, "budget must be positive and at most num_experts"),
        ({"budget": E + 1}, "budget must be positive and at most num_experts"),
        ({"threshold_decay": 1.0}, "threshold_decay"),
        ({"budget": 1.0, "renormalise": True}, "renormalise=false"),
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


def test_no_tokens_at_all() -> None:
    routing = router(train=False)(torch.zeros(0, D, dtype=torch.float64), RoutingContext())
    assert len(routing.token_N) == routing.counts_E.sum() == 0


@pytest.mark.parametrize("scope", ["sequence", "token_batch", "time_step"])
def test_padding_alone_leaves_everything_finite(scope: str) -> None:
    made = router(scope=scope, balance_loss=0.1)
    routing = made(hidden(), RoutingContext(sequences=B, mask_T=torch.zeros(T, dtype=torch.bool)))
    assert len(routing.token_N) == 0
    assert all(torch.isfinite(value) for value in [*routing.stats.values(), *routing.losses.values()])
    assert not routing.feedback.any()
