"""Top-k routing: choice, weights, losses and their gradients against the equations.

Legend: T tokens, D model, E experts, K choices, N assignments.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import Routing, RoutingContext
from tests.moe import reference

T, D, E = 10, 6, 5
COMBINE = ("softmax_then_topk", "topk_then_softmax", "sigmoid", "straight_through")


def router(k: int = 2, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["topk"]
    made = cls(D, E, k, cls.Options(**options)).double()
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "noise" in name else 1.0)
    if options.get("bias_update_rate"):
        made.bias_E.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0, -0.4]))
    return made.train(train)


def hidden(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)


def logits(made: Router, hidden_TD: Tensor) -> Tensor:
    return torch.stack([made.scores.weight @ x for x in hidden_TD])


def assert_same_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    pairs = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (got, want)]
    for left, right in zip(*pairs, strict=True):
        torch.testing.assert_close(left, right)


RULES = [
    (combine, renormalise, scale, k, bias)
    for combine, renormalise, scale, k, bias in itertools.product(
        COMBINE, (False, True), (1.0, 2.5), (1, 2, E), (0.0, 1e-3)
    )
    if not (k == 1 and (renormalise or combine == "topk_then_softmax"))
    and not (renormalise and combine == "straight_through")
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("combine", "renormalise", "scale", "k", "bias"), RULES)
def test_choice_and_weights_equal_the_equations(
    combine: str, renormalise: bool, scale: float, k: int, bias: float, train: bool
) -> None:
    made = router(k, train, combine=combine, renormalise=renormalise, scale=scale, bias_update_rate=bias)
    hidden_TD = hidden()
    routing = made(hidden_TD, RoutingContext())
    bias_E = made.bias_E if bias else None
    choices = [reference.choose(row, k, combine, renormalise, scale, bias_E) for row in logits(made, hidden_TD)]

    pairs = [(t, e, w) for t, chosen in enumerate(choices) for e, w in chosen]
    assert routing.token_N.tolist() == [t for t, _, _ in pairs]
    assert routing.expert_N.tolist() == [e for _, e, _ in pairs]
    assert routing.counts_E.tolist() == [sum(e == i for _, e, _ in pairs) for i in range(E)]
    assert (routing.num_tokens, routing.choices) == (T, k)
    want_N = torch.stack([w for _, _, w in pairs])
    torch.testing.assert_close(routing.weight_N, want_N)
    direction_N = torch.randn(T * k, dtype=torch.float64)
    assert_same_gradients(
        (routing.weight_N * direction_N).sum(), (want_N * direction_N).sum(), [hidden_TD, made.scores.weight]
    )
    assert bool(routing.losses) == train


def test_straight_through_has_the_values_of_one_rule_and_the_gradient_of_another() -> None:
    through, values, slopes = (router(combine=c) for c in ("straight_through", *COMBINE[1::-1]))
    for other in (values, slopes):
        other.load_state_dict(through.state_dict())
    hidden_TD = hidden()
    weights = [made(hidden_TD, RoutingContext()).weight_N for made in (through, values, slopes)]
    torch.testing.assert_close(weights[0], weights[1])
    direction_N = torch.randn_like(weights[0])
    gradients = [torch.autograd.grad((w * direction_N).sum(), hidden_TD)[0] for w in weights]
    torch.testing.assert_close(gradients[0], gradients[2])
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "options", [{"combine": "topk_then_softmax"}, *({"combine": c, "renormalise": True} for c in COMBINE)]
)
def test_weights_that_would_be_constantly_one_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="softmax_then_topk"):
        router(1, **options)
    if options["combine"] != "straight_through":
        router(2, **options)


def test_renormalising_straight_through_weights_is_refused() -> None:
    """Their values sum to 1 already; dividing by the sum would change the gradient that the rule promises."""
    with pytest.raises(ValueError, match="straight_through weights sum to 1"):
        router(2, combine="straight_through", renormalise=True)


@pytest.mark.parametrize("combine", ["softmax_then_topk", "sigmoid", "straight_through"])
def test_router_learns_from_the_task_at_k_1(combine: str) -> None:
    made, hidden_TD = router(1, combine=combine, balance_loss=0.0), hidden()
    routing = made(hidden_TD, RoutingContext())
    assert not routing.losses
    (gradient,) = torch.autograd.grad((routing.weight_N * torch.randn(T)).sum(), made.scores.weight)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("combine", COMBINE)
def test_bias_decides_the_choice_and_nothing_else(combine: str) -> None:
    """A huge bias forces two experts; their weights are what they would have been without it."""
    made = router(combine=combine, bias_update_rate=1e-3, balance_loss=0.0)
    made.bias_E.copy_(torch.tensor([0.0, 100.0, 0.0, 50.0, 0.0]))
    hidden_TD = hidden()
    routing = made(hidden_TD, RoutingContext())
    assert routing.expert_N.view(T, 2).tolist() == [[1, 3]] * T
    full = router(E, combine=combine if combine in ("sigmoid", "softmax_then_topk") else "softmax_then_topk")
    full.load_state_dict(made.state_dict(), strict=False)
    every = full(hidden_TD, RoutingContext())
    value_TE = torch.zeros(T, E, dtype=torch.float64).index_put((every.token_N, every.expert_N), every.weight_N)
    pair_TK = value_TE[:, [1, 3]]
    if combine in ("topk_then_softmax", "straight_through"):
        pair_TK = pair_TK / pair_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weight_N, pair_TK.reshape(-1))


LOSSES = {
    "switch": {"balance_loss": 0.3},
    "gshard": {"balance_loss": 0.3, "balance_form": "gshard"},
    "kl": {"balance_loss": 0.3, "balance_form": "kl"},
    "sigmoid": {"balance_loss": 0.3, "combine": "sigmoid"},
    "sigmoid_bias": {"balance_loss": 0.3, "combine": "sigmoid", "bias_update_rate": 1e-3},
    "local": {"balance_loss": 0.3, "balance_scope": "local"},
    "z": {"balance_loss": 0.0, "z_loss": 0.2},
    "importance": {"balance_loss": 0.0, "importance_loss": 0.7},
    "importance_renormalised": {"balance_loss": 0.0, "importance_loss": 0.7, "renormalise": True, "scale": 2.5},
    "all": {"balance_loss": 0.3, "z_loss": 0.2, "importance_loss": 0.7},
    "none": {"balance_loss": 0.0},
}


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("options", "k"),
    [
        pytest.param(options, k, id=f"{name}-{k}")
        for name, options in LOSSES.items()
        for k in (1, 2)
        if not (k == 1 and options.get("renormalise"))  # refused
    ],
)
def test_losses_equal_the_equations_over_real_tokens(options: dict[str, Any], k: int, masked: bool) -> None:
    made, hidden_TD = router(k, **options), hidden()
    mask_T = torch.arange(T) % 4 != 1
    routing = made(hidden_TD, RoutingContext(mask_T=mask_T if masked else None))

    logits_TE = logits(made, hidden_TD[mask_T] if masked else hidden_TD)
    combine, bias_E = options.get("combine", "softmax_then_topk"), getattr(made, "bias_E", None)
    rule = (k, combine, options.get("renormalise", False), options.get("scale", 1.0), bias_E)
    choices = [reference.choose(row, *rule) for row in logits_TE]
    want = {
        "balance_loss": reference.balance(
            logits_TE, choices, options.get("balance_form", "switch"), combine == "sigmoid"
        ),
        "z_loss": reference.z_loss(logits_TE),
        "importance_loss": reference.importance(choices, E),
    }
    want = {name: value for name, value in want.items() if options.get(name)}
    assert set(routing.losses) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(routing.losses[name], options[name] * value)
        torch.testing.assert_close(routing.stats[name], value.detach())
        assert not routing.stats[name].requires_grad
        assert_same_gradients(routing.losses[name], options[name] * value, [hidden_TD, made.scores.weight])


@pytest.mark.parametrize("form", ["switch", "gshard", "kl"])
def test_balance_loss_spreads_a_collapsed_router(form: str) -> None:
    made = router(1, balance_loss=1.0, balance_form=form)
    with torch.no_grad():
        made.scores.weight.mul_(0.1)
        made.scores.weight[2] += 0.3
    hidden_TD = hidden(256).detach() + 1
    optimizer = torch.optim.SGD(made.parameters(), lr=0.3)
    violations = []
    for _ in range(100):
        routing = made(hidden_TD, RoutingContext())
        violations.append((routing.counts_E.max() * E / 256 - 1).item())
        optimizer.zero_grad()
        routing.losses["balance_loss"].backward()
        optimizer.step()
    assert violations[0] > 2
    assert min(violations[-20:]) < 1


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_figures(masked: bool) -> None:
    made, hidden_TD = router(), hidden()
    mask_T = torch.arange(T) % 3 != 0
    stats = made(hidden_TD, RoutingContext(mask_T=mask_T if masked else None)).stats
    probs = [reference.normalise_exp(row) for row in logits(made, hidden_TD[mask_T] if masked else hidden_TD)]
    entropy = sum(-(p * p.log()).sum() for p in probs) / len(probs)
    first = sum(p.max() for p in probs) / len(probs)
    assert stats["router_entropy"].item() == pytest.approx(entropy.item())
    assert stats["first_weight"].item() == pytest.approx(first.item())
    assert all(not value.requires_grad and value.dim() == 0 for value in stats.values())


@pytest.mark.parametrize("k", [1, 3, E])
def test_evaluation_may_choose_its_own_number_of_experts(k: int) -> None:
    made, hidden_TD = router(2, train=False), hidden()
    routing = made(hidden_TD, RoutingContext(experts_per_token=k))
    choices = [reference.choose(row, k) for row in logits(made, hidden_TD)]
    assert routing.expert_N.tolist() == [e for chosen in choices for e, _ in chosen]
    torch.testing.assert_close(routing.weight_N, torch.stack([w for chosen in choices for _, w in chosen]))


@pytest.mark.parametrize("k", [-1, 0, E + 1])
def test_impossible_numbers_of_experts_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"1..{E}"):
        router(k)
    with pytest.raises(ValueError, match=f"1..{E}"):
        router(2, train=False)(hidden(), RoutingContext(experts_per_token=k))


def test_float32_whatever_the_models_dtype() -> None:
    """Choices and weights of a bfloat16 model are those of a float32 router on the same values."""
    made = router(z_loss=1e-3).bfloat16()
    hidden_TD = hidden().detach().bfloat16()
    exact = router()
    exact.scores.weight.data.copy_(made.scores.weight)
    got, want = made(hidden_TD, RoutingContext()), exact(hidden_TD.double(), RoutingContext())
    assert got.weight_N.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in got.losses.values())
    assert got.expert_N.tolist() == want.expert_N.tolist()
    torch.testing.assert_close(got.weight_N.double(), want.weight_N, rtol=1e-5, atol=1e-6)


def test_float32_under_autocast() -> None:
    made, hidden_TD = router(z_loss=1e-3).float(), hidden().detach().float()
    want = made(hidden_TD, RoutingContext())
    with torch.autocast("cpu", torch.bfloat16):
        got = made(hidden_TD, RoutingContext())
    torch.testing.assert_close(got.weight_N, want.weight_N)
    torch.testing.assert_close(got.losses, want.losses)


def test_a_permutation_of_tokens_permutes_the_answer() -> None:
    made, hidden_TD, order_T = router(z_loss=0.1, importance_loss=0.1), hidden(), torch.randperm(T)
    plain, permuted = made(hidden_TD, RoutingContext()), made(hidden_TD[order_T], RoutingContext())
    assert torch.equal(permuted.expert_N.view(T, 2), plain.expert_N.view(T, 2)[order_T])
    torch.testing.assert_close(permuted.weight_N.view(T, 2), plain.weight_N.view(T, 2)[order_T])
    torch.testing.assert_close(permuted.losses, plain.losses)


def test_no_tokens_at_all() -> None:
    """A rank may be left without any."""
    routing: Routing = router(train=False)(hidden(0), RoutingContext())
    assert len(routing.token_N) == routing.counts_E.sum() == 0
