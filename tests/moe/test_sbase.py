"""S-BASE: experts of the balanced plan, weights of the raw logits.

Legend: T tokens, D model, E experts, K choices, N assignments.
"""

from __future__ import annotations

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
    cls = ROUTERS["sbase"]
    made = cls(D, E, k, cls.Options(**{"iterations": ITERATIONS, **options})).double()
    torch.nn.init.normal_(made.scores.weight)
    return made.train(train)


def hidden(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)


def logits(made: Router, hidden_TD: Tensor) -> Tensor:
    return torch.stack([made.scores.weight @ x for x in hidden_TD])


def weights(logits_E: Tensor, k: int) -> Tensor:
    """sigmoid for one expert a token, softmax over all experts for more."""
    return 1 / (1 + torch.exp(-logits_E)) if k == 1 else reference.normalise_exp(logits_E)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("entropy", [1.0, 0.3])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("rule", reference.SHARES, ids=str)
def test_choice_weights_and_gradients_equal_the_equations(
    k: int, entropy: float, train: bool, masked: bool, rule: dict[str, Any]
) -> None:
    if k == 1 and rule.get("renormalise"):
        with pytest.raises(ValueError, match="router would get no gradient"):
            router(k, **rule)
        return
    made, hidden_TD = router(k, train, entropy=entropy, **rule), hidden()
    mask_T = torch.arange(T) % 4 != 1
    routing = made(hidden_TD, RoutingContext(mask_T=mask_T if masked else None))

    real = mask_T.nonzero()[:, 0].tolist() if masked else list(range(T))
    logits_TE = logits(made, hidden_TD[real])
    order_TE = exact.plan(logits_TE.detach(), entropy, ITERATIONS) if train else logits_TE
    chosen = [
        [(e, weights(logits_E, k)[e]) for e in reference.best(order_E, k)]
        for logits_E, order_E in zip(logits_TE, order_TE, strict=True)
    ]
    want = [(t, e, w) for t, gates in zip(real, chosen, strict=True) for e, w in reference.shares(gates, **rule)]
    is_real_N = torch.isin(routing.token_N, torch.tensor(real))
    assert routing.token_N[is_real_N].tolist() == [t for t, _, _ in want]
    assert routing.expert_N[is_real_N].tolist() == [e for _, e, _ in want]
    assert routing.load_E.tolist() == [sum(e == i for _, e, _ in want) for i in range(E)]
    assert (routing.num_tokens, routing.choices, len(routing.token_N)) == (T, k, T * k)
    assert not routing.losses
    if train:
        error = (order_TE.sum(0) * E / len(real) - 1).abs().max().item()
        assert routing.stats["column_error"].item() == pytest.approx(error, abs=1e-12)

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


def test_the_plan_changes_who_is_chosen_but_no_weight() -> None:
    made, hidden_TD = router(1), hidden(64)
    routing = made(hidden_TD, RoutingContext())
    logits_TE = logits(made, hidden_TD)
    assert routing.expert_N.tolist() != logits_TE.argmax(-1).tolist()
    torch.testing.assert_close(routing.weight_N, logits_TE[torch.arange(64), routing.expert_N].sigmoid())


@pytest.mark.parametrize("k", [1, 2])
def test_training_balances_a_collapsed_router(k: int) -> None:
    """Exactly balanced are the sums of the plan; its k largest entries of each row are nearly so."""
    made = router(k, iterations=50, entropy=0.5)
    with torch.no_grad():
        made.scores.weight[2] += 2.0
    hidden_TD = hidden(512).detach() + 1
    balanced, plain = made(hidden_TD, RoutingContext()), made.eval()(hidden_TD, RoutingContext())
    assert plain.load_E.max() > 0.9 * 512
    assert balanced.load_E.max() < 1.4 * k * 512 / E
    assert balanced.load_E.min() > 0.6 * k * 512 / E


@pytest.mark.parametrize("k", [1, 2])
def test_evaluation_is_each_tokens_own_and_training_is_not(k: int) -> None:
    made, hidden_TD = router(k, train=False), hidden(32)
    changed_TD = hidden_TD.detach().clone()
    changed_TD[16:] = changed_TD[16:].abs() * made.scores.weight.detach()[0].sign() * 3  # all for expert 0
    for train in (False, True):
        made.train(train)
        first, second = (made(x, RoutingContext()).expert_N.view(32, k)[:16] for x in (hidden_TD, changed_TD))
        assert torch.equal(first, second) != train


@pytest.mark.parametrize("trained", [1, 2])
@pytest.mark.parametrize("k", [1, 3, E])
def test_another_number_of_experts_keeps_the_trained_rule(trained: int, k: int) -> None:
    made, hidden_TD = router(trained, train=False), hidden()
    routing = made(hidden_TD, RoutingContext(experts_per_token=k))
    want = [(e, weights(row, trained)[e]) for row in logits(made, hidden_TD) for e in reference.best(row, k)]
    assert routing.expert_N.tolist() == [e for e, _ in want]
    torch.testing.assert_close(routing.weight_N, torch.stack([w for _, w in want]))


@pytest.mark.parametrize("given", [{"entropy": 0.0}, {"entropy": -1.0}, {"iterations": 0}, {"tolerance": 0.0}], ids=str)
def test_impossible_options_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        router(**given)


def test_no_balance_loss_is_offered() -> None:
    with pytest.raises(TypeError, match="balance_loss"):
        router(balance_loss=0.01)


@pytest.mark.parametrize("k", [1, 2])
def test_float32_whatever_the_models_dtype(k: int) -> None:
    made, hidden_TD = router(k).bfloat16(), hidden().detach().bfloat16()
    wide = router(k)
    wide.scores.weight.data.copy_(made.scores.weight)
    got, want = made(hidden_TD, RoutingContext()), wide(hidden_TD.double(), RoutingContext())
    assert got.weight_N.dtype == torch.float32
    assert got.expert_N.tolist() == want.expert_N.tolist()
    torch.testing.assert_close(got.weight_N.double(), want.weight_N, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_nothing_but_padding(tokens: int) -> None:
    made, hidden_TD = router(), hidden(tokens)
    for mask_T in (None, torch.zeros(tokens, dtype=torch.bool)):
        routing = made(hidden_TD, RoutingContext(mask_T=mask_T))
        assert routing.counts_E.sum() == 2 * tokens
        assert torch.isfinite(routing.weight_N).all()
