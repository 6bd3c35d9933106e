"""Dropout within experts: its law, its equations, and that nothing but the assignment decides it.

Legend: T tokens, N assignments, D model, F hidden, E experts.
"""

from __future__ import annotations

import pytest
import torch

from s2moe.moe.config import resolve_moe
from s2moe.moe.expert_dropout import assignment_seeds, dropout_factors
from s2moe.moe.expert_product import expert_product
from s2moe.moe.layer import SMoELayer, build_layer
from s2moe.moe.routing import RoutingContext
from tests.moe import reference

D, F, E = 6, 8, 4


def layer(**given: object) -> SMoELayer:
    settings = {"method": "smoe", "num_experts": E, "expert_hidden": F, "expert_form": "mlp_biases", **given}
    made = build_layer(resolve_moe(settings), D, 3).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_factors_have_the_law_of_dropout(rate: float) -> None:
    seed_N = assignment_seeds_of(400)
    factor_NF = dropout_factors(seed_N, 250, rate, "activation", torch.float64)
    assert set(factor_NF.unique().tolist()) == {0.0, 1 / (1 - rate)}
    dropped_NF = (factor_NF == 0).double()
    assert dropped_NF.mean().item() == pytest.approx(rate, abs=0.005)
    assert dropped_NF.mean(0).std().item() == pytest.approx((rate * (1 - rate) / 400) ** 0.5, rel=0.2)
    assert dropped_NF.mean(1).std().item() == pytest.approx((rate * (1 - rate) / 250) ** 0.5, rel=0.2)
    centred_NF = dropped_NF - rate
    for other_NF in (centred_NF.roll(1, 0), centred_NF.roll(1, 1)):  # neighbours know nothing of each other
        assert abs((centred_NF * other_NF).mean().item()) < 0.005
    output_NF = dropout_factors(seed_N, 250, rate, "output", torch.float64)
    assert abs(((output_NF == 0).double() - rate).mul(centred_NF).mean().item()) < 0.005


def assignment_seeds_of(count: int) -> torch.Tensor:
    made = layer(expert_dropout=0.5)
    routing = made.router(torch.randn(count // 2, D, dtype=torch.float64), RoutingContext())
    seed_N = assignment_seeds(routing, 12345)
    assert len(seed_N.unique()) == count
    return seed_N


@pytest.mark.parametrize("form", ["gated", "mlp", "mlp_biases"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("backend", ["loop", "every"])
def test_factors_of_the_activation_and_their_gradients(form: str, weighted: bool, backend: str) -> None:
    """By finite differences, and by what W2 (factor ⊙ act) is in each form."""
    counts_E = torch.tensor([2, 0, 3])
    w3_shape = {"gated": (3, F, D), "mlp": (3, 1, F), "mlp_biases": (3, 1, F + D)}[form]
    shapes = [(5, D), (5,), (3, F, D), (3, D, F), w3_shape]
    rows, weight, w1, w2, w3 = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    factor_NF = torch.randint(0, 2, (5, F)) * 2.0

    def product(*t: torch.Tensor) -> torch.Tensor:
        given = t[1] if weighted else None
        return expert_product(t[0], counts_E, given, *t[2:], form, "gelu", backend, factor_NF.double())

    out_ND = product(rows, weight, w1, w2, w3)
    for n, e in enumerate((0, 0, 2, 2, 2)):
        masked = w2[e] * factor_NF[n]  # W2 (factor ⊙ act) = (W2 · diag factor) act
        want_D = reference.expert_mlp(rows[n], w1[e], masked, w3[e], form, "gelu")
        torch.testing.assert_close(out_ND[n], want_D * weight[n] if weighted else want_D)
    tensors = (rows, weight, w1, w2, w3)
    if not weighted:
        weight.requires_grad_(False)
    assert torch.autograd.gradcheck(product, tensors)


def test_layer_equals_the_equations() -> None:
    made = layer(expert_dropout=0.4)
    x_BSD = torch.randn(2, 5, D, dtype=torch.float64)
    context = RoutingContext(seed=1, step=2)
    out_TD = made(x_BSD, context)[0].view(-1, D)
    inner = RoutingContext(seed=1, step=2, layer=3)
    key = inner.generator(torch.device("cpu"), "expert dropout").initial_seed()
    x_TD = x_BSD.view(-1, D)
    routing = made.router(x_TD, inner)
    seed_N = assignment_seeds(routing, key)
    hidden_NF = dropout_factors(seed_N, F, 0.4, "activation", torch.float64)
    output_ND = dropout_factors(seed_N, D, 0.4, "output", torch.float64)
    want_TD = torch.zeros_like(x_TD)
    w1, w2, w3 = made.experts.w1, made.experts.w2, made.experts.w3
    for n, (t, e) in enumerate(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)):
        one = reference.expert_mlp(x_TD[t], w1[e], w2[e] * hidden_NF[n], w3[e], "mlp_biases", "silu")
        want_TD[t] = want_TD[t] + routing.weight_N[n] * output_ND[n] * one
    torch.testing.assert_close(out_TD, want_TD)


def test_draws_follow_the_context_and_evaluation_has_none() -> None:
    made, plain = layer(expert_dropout=0.4), layer()
    plain.load_state_dict(made.state_dict())
    x_BSD = torch.randn(2, 5, D, dtype=torch.float64)
    first, again, other = (made(x_BSD, RoutingContext(step=step))[0] for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(made.eval()(x_BSD)[0], plain.eval()(x_BSD)[0])


@pytest.mark.parametrize("method", ["s2moe", "compete_smoe", "simsmoe"])
def test_every_way_through_the_experts_has_it(method: str) -> None:
    competition = {"competition": {"rate": 1.0}} if method == "compete_smoe" else {}
    results = []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        made = build_layer(
            resolve_moe(
                {"method": method, "num_experts": E, "expert_hidden": F, "expert_dropout": rate, **competition}
            ),
            D,
            0,
        )
        made.experts.reset_parameters(0.5)
        results.append(made(torch.ones(2, 5, D), RoutingContext(steps=10))[0])
    assert not torch.allclose(*results)


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="expert_dropout"):
        resolve_moe({"expert_dropout": 1.0})
