"""X-MoE's router against the equations, and what the paper asks of it.

Legend: T tokens, D model, E experts, C dimension of the hypersphere, K choices per token.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.config import resolve_moe
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routers.xmoe import XMoERouter
from s2moe.moe.routing import RoutingContext
from s2moe.parallel.deepspeed_compat import optimizer_groups
from tests.models.decoder import ROTARY, tiny
from tests.moe import reference

T, D, E = 10, 6, 5
PAPER = {"softmax": 0.3, "sigmoid": 0.07}


def router(k: int = 1, train: bool = True, experts: int = E, **options: Any) -> XMoERouter:
    made = XMoERouter(D, experts, k, XMoERouter.Options(**options)).double()
    torch.nn.init.normal_(made.projection.weight)
    torch.nn.init.normal_(made.embedding_EC)
    return made.train(train)


def hidden(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)


def cosines(made: XMoERouter, h_D: Tensor) -> Tensor:
    """s_i = cos(W h, e_i), one expert at a time."""
    point_C = made.projection.weight @ h_D
    return torch.stack([point_C @ e_C / (point_C.norm() * e_C.norm()) for e_C in made.embedding_EC])


def gate_of(score_E: Tensor, gate: str, temperature: Tensor | float) -> Tensor:
    if gate == "softmax":
        return reference.normalise_exp(score_E / temperature)
    return 1 / (1 + torch.exp(-score_E / temperature))


def assert_same_gradients(got: Tensor, want: Tensor, made: XMoERouter, hidden_TD: Tensor) -> None:
    inputs = [hidden_TD, made.projection.weight, made.embedding_EC, made.log_temperature]
    pairs = [
        torch.autograd.grad(v, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for v in (got, want)
    ]
    for left, right in zip(*pairs, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rule", reference.SHARES, ids=str)
@pytest.mark.parametrize("given", [{}, {"temperature": 0.5, "balance_temperature": 0.2, "dimension": 3}], ids=str)
def test_routing_equals_the_equations(
    gate: str, k: int, train: bool, masked: bool, given: dict[str, Any], rule: dict[str, Any]
) -> None:
    if k == 1 and rule.get("renormalise"):
        with pytest.raises(ValueError, match="router would get no gradient"):
            router(k, **rule)
        return
    made, hidden_TD = router(k, train, gate=gate, balance_loss=0.3, z_loss=0.1, **given, **rule), hidden()
    mask_T = torch.arange(T) % 4 != 1
    routing = made(hidden_TD, RoutingContext(mask_T=mask_T if masked else None))

    tau, tau0 = given.get("temperature", PAPER[gate]), given.get("balance_temperature", PAPER[gate])
    learned = torch.exp(made.log_temperature[0])
    assert learned.item() == pytest.approx(tau)
    want, load, mean_prob, z, real = [], [0] * E, [torch.zeros(())] * E, torch.zeros(()), 0
    for t in range(T):
        score_E = cosines(made, hidden_TD[t])
        gate_E = gate_of(score_E, gate, learned)
        chosen = reference.best(score_E, k)
        want += [(t, e, weight) for e, weight in reference.shares([(e, gate_E[e]) for e in chosen], **rule)]
        if masked and not mask_T[t]:
            continue
        real += 1
        for e in chosen:
            load[e] += 1
        balance_E = reference.normalise_exp(score_E / tau0)
        mean_prob = [p + q for p, q in zip(mean_prob, balance_E, strict=True)]
        z = z + torch.log(torch.exp(score_E / learned).sum()) ** 2
    assert routing.token_N.tolist() == [t for t, _, _ in want]
    assert routing.expert_N.tolist() == [e for _, e, _ in want]
    assert routing.load_E.tolist() == load
    want_N = torch.stack([w for _, _, w in want])
    torch.testing.assert_close(routing.weight_N, want_N)
    direction_N = torch.randn_like(want_N)
    assert_same_gradients((routing.weight_N * direction_N).sum(), (want_N * direction_N).sum(), made, hidden_TD)
    assert routing.stats["temperature"].item() == pytest.approx(tau)

    if not train:
        assert not routing.losses
        return
    balance = E * sum(n / sum(load) * p / real for n, p in zip(load, mean_prob, strict=True))
    for name, value in (("balance_loss", 0.3 * balance), ("z_loss", 0.1 * z / real)):
        torch.testing.assert_close(routing.losses[name], value)
        assert_same_gradients(routing.losses[name], value, made, hidden_TD)
    assert set(routing.losses) == {"balance_loss", "z_loss"}


def test_only_angles_matter_on_both_sides() -> None:
    """Longer tokens or longer expert embeddings change nothing."""
    made, hidden_TD = router(2, gate="softmax"), hidden()
    plain = made(hidden_TD, RoutingContext())
    with torch.no_grad():
        made.embedding_EC.mul_(torch.rand(E, 1, dtype=torch.float64) + 0.5)
    scaled = made(hidden_TD * (torch.rand(T, 1, dtype=torch.float64) + 0.5), RoutingContext())
    assert torch.equal(scaled.expert_N, plain.expert_N)
    torch.testing.assert_close(scaled.weight_N, plain.weight_N)
    score_TE = made.scores(hidden_TD)
    assert score_TE.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(made.scores(-hidden_TD), -score_TE)


def test_the_temperature_has_no_part_in_the_choice_and_the_balance_loss_none_in_it() -> None:
    made, hidden_TD = router(2), hidden()
    seen = []
    for rho in (-3.0, 0.0, 2.0):
        with torch.no_grad():
            made.log_temperature.fill_(rho)
        seen.append(made(hidden_TD, RoutingContext()))
    for other in seen[1:]:
        assert torch.equal(other.expert_N, seen[0].expert_N)
        torch.testing.assert_close(other.losses, seen[0].losses)
        assert not torch.allclose(other.weight_N, seen[0].weight_N)
    (gradient,) = torch.autograd.grad(seen[0].losses["balance_loss"], made.log_temperature, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_balance_loss_does_not_depend_on_the_size_of_the_batch(gate: str) -> None:
    """f is a share of the assignments: the same tokens twice cost the same."""
    made, hidden_TD = router(gate=gate), hidden()
    once, twice = (made(h, RoutingContext()).losses["balance_loss"] for h in (hidden_TD, hidden_TD.repeat(2, 1)))
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_temperature_is_learned_and_never_below_its_least_value(gate: str) -> None:
    made, hidden_TD = router(gate=gate), hidden()
    routing = made(hidden_TD, RoutingContext())
    (gradient,) = torch.autograd.grad(routing.weight_N.sum(), made.log_temperature)
    assert gradient.shape == (1,)
    assert gradient.abs().item() > 1e-3
    with torch.no_grad():
        made.log_temperature.fill_(-60.0)
    routing = made(hidden_TD, RoutingContext())
    assert routing.stats["temperature"].item() == pytest.approx(1e-4)
    want_N = torch.stack([gate_of(cosines(made, h), gate, 1e-4).max() for h in hidden_TD])
    torch.testing.assert_close(routing.weight_N, want_N)
    assert torch.isfinite(torch.autograd.grad(routing.weight_N.sum(), hidden_TD)[0]).all()


@pytest.mark.parametrize("rule", reference.SHARES[1:], ids=str)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_weights_that_sum_to_1_do_so_at_the_least_temperature(gate: str, rule: dict[str, Any]) -> None:
    """Where every sigmoid may be too small for a float: σ(-1 / 1e-4)."""
    made = router(2, gate=gate, **rule).float()
    with torch.no_grad():
        made.log_temperature.fill_(-60.0)
        made.embedding_EC[1:] = made.embedding_EC[0] + 1e-3 * torch.randn(E - 1, E // 2)
        opposite_D = -torch.linalg.lstsq(made.projection.weight, made.embedding_EC[0]).solution
    hidden_TD = opposite_D.expand(3, D).clone().requires_grad_()
    assert made.scores(hidden_TD).max() < -0.9
    routing = made(hidden_TD, RoutingContext())
    torch.testing.assert_close(routing.weight_N.view(3, 2).sum(-1), torch.ones(3))
    assert torch.isfinite(torch.autograd.grad(routing.weight_N.sum(), hidden_TD)[0]).all()


def test_straight_through_trains_the_router_of_one_expert_a_token() -> None:
    made, hidden_TD = router(combine="straight_through"), hidden()
    plain = router()
    plain.load_state_dict(made.state_dict())
    weight_N = made(hidden_TD, RoutingContext()).weight_N
    assert torch.equal(weight_N, torch.ones(T, dtype=torch.float64))
    assert_same_gradients(weight_N.sum(), made(hidden_TD, RoutingContext()).weight_N.sum(), made, hidden_TD)
    wanted = torch.autograd.grad(plain(hidden_TD, RoutingContext()).weight_N.sum(), plain.embedding_EC)[0]
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(torch.autograd.grad(weight_N.sum(), made.embedding_EC)[0], wanted)


@pytest.mark.parametrize(("experts", "given", "dimension"), [(16, None, 8), (5, None, 2), (1, None, 1), (16, 3, 3)])
def test_dimension(experts: int, given: int | None, dimension: int) -> None:
    made = router(experts=experts, dimension=given)
    assert made.projection.weight.shape == (dimension, D)
    assert made.embedding_EC.shape == (experts, dimension)
    assert made.macs_per_token() == dimension * D + experts * dimension


def test_a_token_at_the_origin_stays_finite() -> None:
    made = router(2)
    hidden_TD = torch.zeros(3, D, dtype=torch.float64, requires_grad=True)
    routing = made(hidden_TD, RoutingContext())
    torch.testing.assert_close(routing.weight_N, torch.full((6,), 1 / E, dtype=torch.float64))
    (routing.weight_N.sum() + routing.losses["balance_loss"]).backward()
    for tensor in (hidden_TD, *made.parameters()):
        assert torch.isfinite(tensor.grad).all()


def test_float32_whatever_the_models_dtype() -> None:
    made = router(2).bfloat16()
    hidden_TD = hidden().detach().bfloat16()
    exact = router(2)
    exact.load_state_dict(made.state_dict())
    got, want = made(hidden_TD, RoutingContext()), exact(hidden_TD.double(), RoutingContext())
    assert got.weight_N.dtype == torch.float32
    assert got.losses["balance_loss"].dtype == torch.float32
    assert got.expert_N.tolist() == want.expert_N.tolist()
    torch.testing.assert_close(got.weight_N.double(), want.weight_N, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(hidden_TD, RoutingContext()).weight_N, got.weight_N)


@pytest.mark.parametrize("k", [1, 3, E])
def test_evaluation_may_choose_its_own_number_of_experts(k: int) -> None:
    made, hidden_TD = router(1, train=False), hidden()
    routing = made(hidden_TD, RoutingContext(experts_per_token=k))
    assert routing.expert_N.view(T, k).tolist() == [reference.best(cosines(made, h), k) for h in hidden_TD]


@pytest.mark.parametrize("option", [{"dimension": 0}, {"temperature": 0.0}, {"balance_temperature": -1.0}], ids=str)
def test_impossible_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be at least"):
        ROUTERS["xmoe"].Options(**option)


def test_two_rules_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="straight_through weights sum to 1 already"):
        router(2, combine="straight_through", renormalise=True)


@pytest.mark.parametrize(("method", "gate"), [("xmoe", "softmax"), ("xmoe_sigmoid", "sigmoid")])
def test_the_method_is_the_papers(method: str, gate: str) -> None:
    """One expert; N/2 dimensions; the gate's and the balance loss' temperatures from the paper."""
    config = resolve_moe({"method": method, "num_experts": 32})
    assert config.experts_per_token == 1
    options = config.router_options()
    assert (options.gate, options.balance_loss, options.z_loss) == (gate, 0.01, 0.0)
    made = ROUTERS["xmoe"](D, 32, 1, options)
    assert made.embedding_EC.shape == (32, 16)
    assert made.log_temperature.item() == pytest.approx(math.log(PAPER[gate]))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_a_new_model_starts_at_the_temperature_and_does_not_decay_it(gate: str) -> None:
    model = tiny("xmoe", {"gate": gate}, initializer_range=0.02, num_hidden_layers=1)
    made = type(model)(model.config)
    found = made.model.layers[0].moe.router
    assert found.log_temperature.item() == pytest.approx(math.log(PAPER[gate]))
    assert 0.01 < found.embedding_EC.std().item() < 0.04
    decay = {id(p): group["weight_decay"] for group in optimizer_groups(made, 0.1) for p in group["params"]}
    assert decay[id(found.log_temperature)] == 0
    assert decay[id(found.embedding_EC)] == decay[id(found.projection.weight)] == 0.1


def test_s2moe_may_route_both_passes_with_it() -> None:
    model = tiny("s2moe", {"name": "xmoe"}).double()
    ids = torch.randint(19, (2, 8))
    out = model(ids, labels=ids)
    out.loss.backward()
    for layer, statistics in zip(model.model.layers, out.routing, strict=True):
        assert statistics.counts_E.sum().item() == 2 * 16
        assert layer.moe.router.log_temperature.grad.abs().item() > 0


@pytest.mark.parametrize("method", ["xmoe", "xmoe_sigmoid"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_logit_sees_a_later_token(method: str, train: bool) -> None:
    model = tiny(method).double().train(train)
    ids = torch.randint(19, (2, 8))
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 7) % 19
    difference_BSV = (model(changed).logits - model(ids).logits).abs()
    assert difference_BSV[0, :5].max() < 1e-9
    assert difference_BSV[1].max() < 1e-9
    assert difference_BSV[0, 5:].amax(-1).min() > 1e-6


@pytest.mark.parametrize("method", ["xmoe", "xmoe_sigmoid"])
def test_decoding_with_the_cache_equals_a_full_pass(method: str) -> None:
    model = tiny(method).double().eval()
    ids = torch.randint(19, (2, 9))
    cache, pieces = None, []
    for piece in ids.split([4, 1, 1, 1, 1, 1], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits, **ROTARY)
