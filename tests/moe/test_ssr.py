"""Selective Sinkhorn Routing: choice, weights and gradients on both kinds of steps against the equations.

Legend: T tokens, D model, E experts, K choices, N assignments.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import RoutingContext
from tests.moe import reference
from tests.moe import transport_reference as exact

T, D, E = 11, 6, 4
ITERATIONS = 7


def router(k: int = 2, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["ssr"]
    made = cls(D, E, k, cls.Options(**{"iterations": ITERATIONS, **options})).double()
    torch.nn.init.normal_(made.scores.weight)
    return made.train(train)


def hidden(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)


def scores(made: Router, hidden_TD: Tensor, by_plan: bool, cost: str, entropy: float) -> list[Tensor]:
    """S: rows of the plan, or softmax of the logits."""
    logits_TE = torch.stack([made.scores.weight @ x for x in hidden_TD])
    softmax_TE = torch.stack([reference.normalise_exp(row) for row in logits_TE])
    if not by_plan:
        return list(softmax_TE)
    return exact.plan_rows(logits_TE if cost == "logits" else softmax_TE, entropy, ITERATIONS)


def assignments(rows: list[Tensor], k: int, renormalise: bool) -> list[tuple[int, int, Tensor]]:
    """(token, expert, weight), token by token, best first."""
    found = []
    for t, score_E in enumerate(rows):
        chosen = reference.best(score_E, k)
        total = sum(score_E[e] for e in chosen) if renormalise else 1
        found += [(t, e, score_E[e] / total) for e in chosen]
    return found


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("cost", "entropy", "k", "renormalise"),
    [
        rule
        for rule in itertools.product(("logits", "softmax"), (None, 0.4), (1, 2, E), (None, False, True))
        if not (rule[2] == 1 and rule[3])  # refused
    ],
)
@pytest.mark.parametrize("step", ["sinkhorn", "ordinary", "evaluation"])
def test_every_step_equals_the_equations(
    step: str, cost: str, entropy: float | None, k: int, renormalise: bool | None, masked: bool
) -> None:
    probability = 0.0 if step == "ordinary" else 1.0  # which an evaluation does not care about
    made = router(k, step != "evaluation", probability=probability, cost=cost, entropy=entropy, renormalise=renormalise)
    hidden_TD, mask_T = hidden(), torch.arange(T) % 4 != 1
    routing = made(hidden_TD, RoutingContext(mask_T=mask_T if masked else None))

    real = mask_T.nonzero()[:, 0].tolist() if masked else list(range(T))
    rows = scores(made, hidden_TD[real], step == "sinkhorn", cost, entropy or {"logits": 1.0, "softmax": 0.05}[cost])
    want = assignments(rows, k, k > 1 if renormalise is None else renormalise)
    is_real_N = torch.isin(routing.token_N, torch.tensor(real))
    assert routing.token_N[is_real_N].tolist() == [real[t] for t, _, _ in want]
    assert routing.expert_N[is_real_N].tolist() == [e for _, e, _ in want]
    assert routing.load_E.tolist() == [sum(e == i for _, e, _ in want) for i in range(E)]
    assert (routing.num_tokens, routing.choices, len(routing.token_N)) == (T, k, T * k)
    assert not routing.losses

    got_N, want_N = routing.weight_N[is_real_N], torch.stack([w for _, _, w in want])
    torch.testing.assert_close(got_N, want_N)
    direction_N = torch.randn_like(want_N)
    inputs = [hidden_TD, made.scores.weight]
    for got, right in zip(
        torch.autograd.grad((got_N * direction_N).sum(), inputs),
        torch.autograd.grad((want_N * direction_N).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_the_weights_of_a_sinkhorn_step_are_the_plan_itself() -> None:
    """Not the raw scores at the plan's experts, which is S-BASE."""
    made, hidden_TD = router(E, probability=1.0), hidden()
    routing = made(hidden_TD, RoutingContext())
    plan_TE = exact.plan((hidden_TD @ made.scores.weight.T).detach(), 1.0, ITERATIONS)
    torch.testing.assert_close(routing.weight_N, plan_TE[routing.token_N, routing.expert_N])


def test_a_sinkhorn_step_balances_a_collapsed_router() -> None:
    made = router(1, probability=1.0, iterations=50)
    with torch.no_grad():
        made.scores.weight[2] += 2.0
    hidden_TD = hidden(512).detach() + 1
    balanced, plain = made(hidden_TD, RoutingContext()), made.eval()(hidden_TD, RoutingContext())
    assert plain.load_E.max() > 0.9 * 512
    assert balanced.load_E.max() < 1.3 * 512 / E
    assert balanced.stats["column_error"] < 1e-3


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("detach", [False, True])
def test_detach_gives_the_same_values_and_a_gradient_of_zero(detach: bool, k: int) -> None:
    made, hidden_TD = router(k, probability=1.0, detach=detach), hidden()
    routing = made(hidden_TD, RoutingContext())
    gradients = torch.autograd.grad((routing.weight_N * torch.randn(T * k)).sum(), [hidden_TD, made.scores.weight])
    assert all((gradient.norm() == 0) == detach for gradient in gradients)
    other = router(k, probability=1.0, detach=not detach)
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other(hidden_TD, RoutingContext()).weight_N, routing.weight_N)
    ordinary = router(k, probability=0.0, detach=detach)
    (gradient,) = torch.autograd.grad(
        (ordinary(hidden_TD, RoutingContext()).weight_N * torch.randn(T * k)).sum(), ordinary.scores.weight
    )
    assert gradient.norm() > 1e-3


def kind(made: Router, context: RoutingContext) -> int:
    return int(made(hidden(3), context).stats["sinkhorn_step"].item())


def test_the_share_of_sinkhorn_steps() -> None:
    made = router(probability=0.2, iterations=1)
    drawn = [kind(made, RoutingContext(seed=1, step=step, layer=layer)) for step in range(200) for layer in range(2)]
    assert sum(drawn) == pytest.approx(80, abs=24)  # three standard deviations
    assert drawn[::2] != drawn[1::2]  # every layer draws for itself


def test_all_ranks_micro_batches_and_passes_draw_alike() -> None:
    made = router(probability=0.5, iterations=1)
    for step in range(20):
        context = RoutingContext(seed=3, step=step, layer=1)
        kinds = {kind(made, replace(context, microbatch=number)) for number in range(4)}
        assert kinds == {kind(made, context)} == {kind(made, context.for_copy())}


def test_defaults_are_rare_steps_without_noise_or_losses() -> None:
    options = ROUTERS["ssr"].Options()
    assert (options.probability, options.cost, options.noise, options.detach) == (0.01, "logits", 0.0, False)


def test_noise_is_of_ordinary_training_steps_alone() -> None:
    plain, noisy = router(probability=0.0), router(probability=0.0, noise=0.7)
    noisy.load_state_dict(plain.state_dict())
    hidden_TD, context = hidden(), RoutingContext(seed=4)
    noise_TE = torch.randn(T, E, generator=context.generator(hidden_TD.device, "router noise"), dtype=torch.float64)
    logits_TE = hidden_TD @ plain.scores.weight.T + 0.7 * noise_TE
    want = assignments([reference.normalise_exp(row) for row in logits_TE], 2, True)
    got = noisy(hidden_TD, context)
    assert got.expert_N.tolist() == [e for _, e, _ in want]
    torch.testing.assert_close(got.weight_N, torch.stack([w for _, _, w in want]))
    assert not torch.equal(got.weight_N, noisy(hidden_TD, replace(context, step=1)).weight_N)
    assert torch.equal(got.weight_N, noisy(hidden_TD, context).weight_N)

    for other in (plain, noisy):
        other.eval()
    torch.testing.assert_close(noisy(hidden_TD, context).weight_N, plain(hidden_TD, context).weight_N)
    for other in (plain, noisy):
        other.train().options.probability = 1.0
    torch.testing.assert_close(noisy(hidden_TD, context).weight_N, plain(hidden_TD, context).weight_N)


def test_statistics_have_the_same_names_on_both_kinds_of_steps() -> None:
    hidden_TD = hidden()
    both = [router(probability=p)(hidden_TD, RoutingContext()).stats for p in (0.0, 1.0)]
    assert both[0].keys() == both[1].keys()
    assert [stats["sinkhorn_step"].item() for stats in both] == [0.0, 1.0]
    assert all(value.dim() == 0 and not value.requires_grad for stats in both for value in stats.values())


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_figures(probability: float) -> None:
    """The column error is that of what routed; entropy and the distribution are the router's own."""
    made, hidden_TD, mask_T = router(probability=probability), hidden(), torch.arange(T) % 3 != 0
    routing = made(hidden_TD, RoutingContext(mask_T=mask_T))
    rows = scores(made, hidden_TD[mask_T], probability == 1, "logits", 1.0)
    share_E = sum(rows) / len(rows) * E
    assert routing.stats["column_error"].item() == pytest.approx((share_E - 1).abs().max().item())
    torch.testing.assert_close(routing.prob_TE, (hidden_TD @ made.scores.weight.T).softmax(-1).detach())


@pytest.mark.parametrize("k", [1, 2])
def test_evaluation_is_each_tokens_own_and_a_sinkhorn_step_is_not(k: int) -> None:
    made, hidden_TD = router(k, train=False, probability=1.0), hidden()
    changed_TD = hidden_TD.detach().clone()
    changed_TD[6:] += 3
    for train in (False, True):
        made.train(train)
        first, second = (made(x, RoutingContext()).weight_N.view(T, k)[:6] for x in (hidden_TD, changed_TD))
        assert torch.equal(first, second) != train


@pytest.mark.parametrize("k", [1, 3, E])
def test_evaluation_may_choose_its_own_number_of_experts(k: int) -> None:
    for trained in (1, 2):
        made, hidden_TD = router(trained, train=False), hidden()
        routing = made(hidden_TD, RoutingContext(experts_per_token=k))
        want = assignments(scores(made, hidden_TD, False, "logits", 1.0), k, trained > 1)
        assert routing.expert_N.tolist() == [e for _, e, _ in want]
        torch.testing.assert_close(routing.weight_N, torch.stack([w for _, _, w in want]))


@pytest.mark.parametrize(
    ("k", "given"),
    [
        (2, {"probability": -0.1}),
        (2, {"probability": 1.1}),
        (2, {"entropy": 0.0}),
        (2, {"noise": -1.0}),
        (2, {"iterations": 0}),
        (1, {"renormalise": True}),
    ],
    ids=str,
)
def test_impossible_options_are_refused(k: int, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        router(k, **given)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_float32_whatever_the_models_dtype(probability: float) -> None:
    made, hidden_TD = router(probability=probability).bfloat16(), hidden().detach().bfloat16()
    wide = router(probability=probability)
    wide.scores.weight.data.copy_(made.scores.weight)
    got, want = made(hidden_TD, RoutingContext()), wide(hidden_TD.double(), RoutingContext())
    assert got.weight_N.dtype == torch.float32
    assert got.expert_N.tolist() == want.expert_N.tolist()
    torch.testing.assert_close(got.weight_N.double(), want.weight_N, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_nothing_but_padding(tokens: int) -> None:
    made, hidden_TD = router(probability=1.0), hidden(tokens)
    for mask_T in (None, torch.zeros(tokens, dtype=torch.bool)):
        routing = made(hidden_TD, RoutingContext(mask_T=mask_T))
        assert routing.counts_E.sum() == 2 * tokens
        assert torch.isfinite(routing.weight_N).all()
        (gradient,) = torch.autograd.grad(routing.weight_N.sum(), hidden_TD)
        assert torch.isfinite(gradient).all()


def test_logits_of_ten_thousand() -> None:
    made = router(probability=1.0, iterations=20).float()
    with torch.no_grad():
        made.scores.weight.mul_(1e4)
    hidden_TD = hidden(64).detach().float().requires_grad_()
    routing = made(hidden_TD, RoutingContext())
    routing.weight_N.square().sum().backward()
    assert torch.isfinite(routing.weight_N).all()
    assert torch.isfinite(hidden_TD.grad).all()
    torch.testing.assert_close(routing.weight_N.view(64, 2).sum(-1), torch.ones(64))
