"""The whole SMoE layer against a dense float64 reference: output, losses, every gradient.

Legend: B batch, S sequence, T = B S tokens, D model, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import SMoELayer, build_layer
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import ExpertParallel
from tests.moe import reference

B, S, D, E = 2, 5, 8, 4


def layer(seed: int = 0, **moe: Any) -> SMoELayer:
    """A layer in float64 with random parameters of order one."""
    given = {"method": "smoe", "num_experts": E, "expert_hidden": 7, **moe}
    made = build_layer(resolve_moe(given), D, layer=1).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.6, generator=generator)
    return made


def hidden() -> Tensor:
    return torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)


def experts(made: SMoELayer) -> list[Tensor]:
    return [made.experts.w1, made.experts.w2, made.experts.w3]


def shared(made: SMoELayer, x_TD: Tensor) -> Tensor:
    """The shared experts: one more MLP, for every token, with weight 1."""
    config, mlp = made.config, made.shared
    if mlp is None:
        return torch.zeros_like(x_TD)
    if config.expert_form == "gated":
        operands = (mlp.gate.weight, mlp.down.weight, mlp.up.weight)
    else:
        operands = (mlp.up.weight, mlp.down.weight, mlp.up.bias[None])
    return torch.stack([reference.expert_mlp(x, *operands, config.expert_form, config.activation) for x in x_TD])


def assert_same_gradients(got: Tensor, want: Tensor, made: SMoELayer, hidden_BSD: Tensor) -> None:
    named = [("hidden", hidden_BSD), *made.named_parameters()]
    pairs = [
        torch.autograd.grad(value, [p for _, p in named], retain_graph=True, materialize_grads=True, allow_unused=True)
        for value in (got, want)
    ]
    for (name, _), left, right in zip(named, *pairs, strict=True):
        torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}")
        if name != "hidden":
            assert right.any(), f"the reference says nothing about {name}"


@pytest.mark.parametrize("form", ["gated", "mlp"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("shared_experts", [0, 2])
@pytest.mark.parametrize(
    ("k", "rule"),
    [
        (1, {"combine": "softmax_then_topk"}),
        (1, {"combine": "sigmoid"}),
        (1, {"combine": "straight_through"}),
        (2, {"combine": "softmax_then_topk"}),
        (2, {"combine": "softmax_then_topk", "renormalise": True}),
        (2, {"combine": "topk_then_softmax"}),
        (2, {"combine": "straight_through"}),
        (3, {"combine": "sigmoid", "renormalise": True, "scale": 2.5}),
        (E, {"combine": "softmax_then_topk"}),
    ],
    ids=str,
)
def test_training_equals_the_dense_reference(
    form: str, activation: str, shared_experts: int, k: int, rule: dict[str, Any]
) -> None:
    made = layer(
        expert_form=form,
        activation=activation,
        shared_experts=shared_experts,
        experts_per_token=k,
        router={**rule, "balance_loss": 0.3, "z_loss": 0.05},
    )
    hidden_BSD = hidden()
    out_BSD, statistics = made(hidden_BSD)

    x_TD = hidden_BSD.reshape(-1, D)
    logits_TE = x_TD @ made.router.scores.weight.T
    choices = [reference.choose(row, k, **rule) for row in logits_TE]
    want_TD = reference.mixture(x_TD, choices, experts(made), form, activation) + shared(made, x_TD)
    balance = reference.balance(logits_TE, choices, "switch", rule["combine"] == "sigmoid")
    want_loss = 0.3 * balance + 0.05 * reference.z_loss(logits_TE)

    torch.testing.assert_close(out_BSD, want_TD.view(B, S, D))
    torch.testing.assert_close(statistics.loss, want_loss)
    torch.testing.assert_close(statistics.values["balance_loss"], balance.detach())
    assert statistics.layer == 1
    assert statistics.counts_E.tolist() == [sum(e == i for c in choices for e, _ in c) for i in range(E)]
    direction_BSD = torch.randn_like(out_BSD)
    want = (want_TD.view(B, S, D) * direction_BSD).sum() + want_loss
    assert_same_gradients((out_BSD * direction_BSD).sum() + statistics.loss, want, made, hidden_BSD)


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_capacity_equals_the_dense_reference(policy: str) -> None:
    router = {"capacity_factor": 0.75, "drop_policy": policy, "balance_loss": 0.0}
    made, hidden_BSD = layer(router=router), hidden()
    out_BSD, _ = made(hidden_BSD)
    x_TD = hidden_BSD.reshape(-1, D)
    choices = [reference.choose(made.router.scores.weight @ x, 2) for x in x_TD]
    kept = reference.kept_within_capacity(
        [[e for e, _ in c] for c in choices], [[w.item() for _, w in c] for c in choices], 4, policy
    )  # ceil(0.75 * 2 * 10 / 4) = 4
    choices = [[pair for k, pair in enumerate(c) if (t, k) in kept] for t, c in enumerate(choices)]
    assert len(kept) < 2 * B * S
    want_BSD = reference.mixture(x_TD, choices, experts(made), "gated", "silu").view(B, S, D)
    torch.testing.assert_close(out_BSD, want_BSD)
    direction_BSD = torch.randn_like(out_BSD)
    assert_same_gradients((out_BSD * direction_BSD).sum(), (want_BSD * direction_BSD).sum(), made, hidden_BSD)


@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_evaluation_with_any_number_of_experts(k: int) -> None:
    made, hidden_BSD = layer(shared_experts=1).eval(), hidden()
    out_BSD, statistics = made(hidden_BSD, RoutingContext(experts_per_token=k))
    x_TD = hidden_BSD.reshape(-1, D)
    choices = [reference.choose(made.router.scores.weight @ x, k) for x in x_TD]
    want_TD = reference.mixture(x_TD, choices, experts(made), "gated", "silu") + shared(made, x_TD)
    torch.testing.assert_close(out_BSD, want_TD.view(B, S, D))
    assert statistics.loss.item() == 0
    assert statistics.counts_E.sum().item() == k * B * S


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("combine", ["softmax_then_topk", "sigmoid", "straight_through"])
def test_a_permutation_of_tokens_permutes_the_output(combine: str, train: bool) -> None:
    made, hidden_BSD = layer(router={"combine": combine, "z_loss": 0.1}).train(train), hidden()
    order_T = torch.randperm(B * S)
    out_BSD, statistics = made(hidden_BSD)
    permuted_BSD, permuted = made(hidden_BSD.view(-1, D)[order_T].view(B, S, D))
    torch.testing.assert_close(permuted_BSD.view(-1, D), out_BSD.view(-1, D)[order_T])
    torch.testing.assert_close(permuted.loss, statistics.loss)
    assert torch.equal(permuted.counts_E, statistics.counts_E)


def test_a_permutation_of_experts_changes_nothing() -> None:
    made, twin, hidden_BSD, order_E = layer(), layer(), hidden(), torch.randperm(E)
    with torch.no_grad():
        twin.router.scores.weight.copy_(made.router.scores.weight[order_E])
        for left, right in zip(experts(twin), experts(made), strict=True):
            left.copy_(right[order_E])
    (out_BSD, plain), (permuted_BSD, permuted) = made(hidden_BSD), twin(hidden_BSD)
    torch.testing.assert_close(permuted_BSD, out_BSD)
    torch.testing.assert_close(permuted.loss, plain.loss)
    assert torch.equal(permuted.counts_E, plain.counts_E[order_E])


def test_every_expert_gets_a_gradient_also_one_without_tokens() -> None:
    """ZeRO needs the groups complete on every rank."""
    made, hidden_BSD = layer(experts_per_token=1), hidden()
    with torch.no_grad():
        hidden_BSD[..., 0] = 1.0
        made.router.scores.weight.zero_()
        made.router.scores.weight[2, 0] = 5.0
    out_BSD, statistics = made(hidden_BSD)
    assert statistics.counts_E.tolist() == [0, 0, B * S, 0]
    out_BSD.square().sum().backward()
    for parameter in experts(made):
        assert parameter.grad[2].any()
        assert not parameter.grad[[0, 1, 3]].any()


@pytest.mark.parametrize("form", ["gated", "mlp"])
def test_grouped_kernel_gives_the_same_layer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s2moe.moe import experts as module

    made, hidden_BSD = layer(expert_form=form, expert_hidden=8).float(), hidden().detach().float()
    results = []
    for backend in ("loop", "grouped"):
        product = module.expert_product
        monkeypatch.setattr(module, "expert_product", lambda *a, p=product, b=backend, **k: p(*a, b, **k))
        made.experts.w1 = torch.nn.Parameter(made.experts.w1.detach().clone())
        out_BSD, _ = made(hidden_BSD)
        out_BSD.square().sum().backward()
        results.append((out_BSD.detach(), made.experts.w1.grad))
        monkeypatch.undo()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_an_expert_parallel_rank_holds_its_experts_alone(degree: int) -> None:
    config = resolve_moe({"method": "smoe", "num_experts": E, "expert_hidden": 7})
    for rank in range(degree):
        made = build_layer(config, D, 0, ExpertParallel(size=degree, rank=rank))
        assert {tuple(p.shape) for p in experts(made)} == {(E // degree, 7, D), (E // degree, D, 7)}
        assert list(made.experts.local_experts) == [e for e in range(E) if e // (E // degree) == rank]
        assert made.router.scores.weight.shape == (E, D)


def test_a_degree_that_does_not_divide_the_experts_is_refused() -> None:
    config = resolve_moe({"method": "smoe", "num_experts": E})
    with pytest.raises(ValueError, match="divides 4"):
        build_layer(config, D, 0, ExpertParallel(size=3))
