"""Objectives on hidden states, router and experts: the layer's loss against sums written out, in float64.

Legend: B batch, S sequence, T = B S tokens, D model, E experts, K choices per token.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import SMoELayer, build_layer
from s2moe.moe.regularisers import RegulariserOptions
from s2moe.moe.routing import RoutingContext
from s2moe.objectives.cka import rbf_cka
from s2moe.objectives.sample_similarity import sample_distance, sample_similarity_loss
from s2moe.objectives.snnl import (
    annealed_temperature,
    optimised_temperature,
    pairwise_distance,
    soft_nearest_neighbour_loss,
)
from tests.moe import reference

B, S, D, E, K = 2, 6, 6, 4, 2
T = B * S
TARGETS = torch.tensor([0, 1, 2, 0, 1, -100, 3, 2, 0, 1, 2, 0])


def layer(method: str = "smoe", router: dict[str, Any] | None = None, **regularisers: Any) -> SMoELayer:
    torch.manual_seed(1)
    router = {"balance_loss": 0.0, **(router or {})}
    moe = {
        "method": method,
        "experts_per_token": K,
        "num_experts": E,
        "expert_hidden": 5,
        "router": router,
        "stochastic": {"contrast_loss": 0.0},
        "regularisers": {"samples": T, **regularisers},
    }
    made = build_layer(resolve_moe(moe), D, 0).double()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.7)
    return made.train()


def hidden() -> Tensor:
    return torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)


def run(made: SMoELayer, hidden_BSD: Tensor, **context: Any) -> tuple[Tensor, Any]:
    return made(hidden_BSD, RoutingContext(target_T=TARGETS, **context))


def probabilities(made: SMoELayer, hidden_TD: Tensor) -> Tensor:
    return torch.stack([reference.normalise_exp(made.router.scores.weight @ x) for x in hidden_TD])


def assert_same_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    pairs = [torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) for value in (got, want)]
    for left, right in zip(*pairs, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("classes", ["next_token", "expert"])
def test_soft_nearest_neighbour_loss_of_the_hidden_states(classes: str, masked: bool) -> None:
    made = layer(snnl_loss=0.3, snnl_classes=classes)
    hidden_BSD = hidden()
    mask_T = torch.arange(T) % 5 != 2 if masked else None
    _, statistics = run(made, hidden_BSD, step=2500, mask_T=mask_T)
    hidden_TD = hidden_BSD.view(T, D)
    label_T = TARGETS if classes == "next_token" else probabilities(made, hidden_TD).argmax(-1)
    kept_T = (label_T >= 0) & (torch.ones(T, dtype=torch.bool) if mask_T is None else mask_T)
    temperature = annealed_temperature(2.5)
    want = soft_nearest_neighbour_loss(hidden_TD[kept_T], label_T[kept_T], temperature)
    torch.testing.assert_close(statistics.loss, 0.3 * want)
    assert statistics.values["snnl_loss"].item() == pytest.approx(want.item())
    assert statistics.values["snnl_temperature"].item() == pytest.approx(temperature)
    assert_same_gradients(statistics.loss, 0.3 * want, [hidden_BSD])


def test_a_learned_temperature_gets_the_loss_gradient() -> None:
    made = layer(snnl_loss=0.3, snnl_schedule="learned", snnl_temperature=2.0)
    hidden_BSD = hidden()
    _, statistics = run(made, hidden_BSD)
    kept_T = TARGETS >= 0
    log_T = torch.tensor([math.log(2.0)], dtype=torch.float64, requires_grad=True)
    want = 0.3 * soft_nearest_neighbour_loss(hidden_BSD.view(T, D)[kept_T], TARGETS[kept_T], log_T.exp())
    torch.testing.assert_close(statistics.loss, want, rtol=1e-6, atol=1e-8)
    (got,) = torch.autograd.grad(statistics.loss, made.regularisers.log_temperature)
    torch.testing.assert_close(got, torch.autograd.grad(want, log_T)[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("schedule", "temperature"), [("fixed", 3.0), ("optimised", 3.0)])
def test_fixed_and_optimised_temperatures(schedule: str, temperature: float) -> None:
    made = layer(snnl_loss=0.3, snnl_schedule=schedule, snnl_temperature=temperature, snnl_search_steps=20)
    _, statistics = run(made, hidden())
    found = statistics.values["snnl_temperature"].item()
    assert (found == pytest.approx(temperature)) == (schedule == "fixed")


@pytest.mark.parametrize("form", ["exact", "eps"])
def test_the_optimised_temperature_is_that_of_the_form_in_use(form: str) -> None:
    """Value and gradient, with one anchor that has no partner."""
    made = layer(snnl_loss=0.3, snnl_schedule="optimised", snnl_search_steps=3, snnl_form=form)
    hidden_BSD = hidden()
    _, statistics = run(made, hidden_BSD)
    kept_T = TARGETS >= 0
    hidden_TD, label_T = hidden_BSD.view(T, D)[kept_T], TARGETS[kept_T]
    temperature = optimised_temperature(pairwise_distance(hidden_TD, "cosine"), label_T, 1.0, 3, form=form)
    want = 0.3 * soft_nearest_neighbour_loss(hidden_TD, label_T, temperature, form=form)
    other = optimised_temperature(pairwise_distance(hidden_TD, "cosine"), label_T, 1.0, 3)
    assert torch.equal(temperature, other) == (form == "exact")
    torch.testing.assert_close(statistics.loss, want)
    assert_same_gradients(statistics.loss, want, [hidden_BSD])


def test_without_labels_the_next_token_s_classes_are_missing() -> None:
    with pytest.raises(ValueError, match="snnl_classes=expert"):
        layer(snnl_loss=0.3)(hidden(), RoutingContext())


@pytest.mark.parametrize("masked", [False, True])
def test_sample_similarity_and_importance_of_the_router(masked: bool) -> None:
    made = layer(similarity_loss=0.4, similarity_different=0.1, gate_importance_loss=0.2)
    hidden_BSD = hidden()
    mask_T = torch.arange(T) % 5 != 2 if masked else None
    _, statistics = run(made, hidden_BSD, mask_T=mask_T)
    kept_T = torch.ones(T, dtype=torch.bool) if mask_T is None else mask_T
    prob_TE = probabilities(made, hidden_BSD.view(T, D))[kept_T]
    distance_TT = sample_distance(hidden_BSD.view(T, D)[kept_T])
    total_E = prob_TE.sum(0)
    importance = ((total_E - total_E.mean()) ** 2).sum() / (E - 1) / total_E.mean() ** 2
    want = sample_similarity_loss(prob_TE, distance_TT, 0.4, 0.1) + 0.2 * importance
    torch.testing.assert_close(statistics.loss, want, rtol=1e-6, atol=1e-9)
    assert_same_gradients(statistics.loss, want, [hidden_BSD, made.router.scores.weight])


def expected_cka(made: SMoELayer, hidden_TD: Tensor, threshold: float, shared: int) -> Tensor:
    """Mean CKA of the pairs above T*, from each expert's own outputs on the tokens it shares."""
    w1, w2, w3 = made.experts.w1, made.experts.w2, made.experts.w3
    chosen = [reference.best(made.router.scores.weight @ x, K) for x in hidden_TD]
    found = []
    for i, j in itertools.combinations(range(E), 2):
        tokens = [t for t, c in enumerate(chosen) if i in c and j in c]
        if len(tokens) <= shared:
            continue
        outputs = [
            torch.stack([reference.expert_mlp(hidden_TD[t], w1[e], w2[e], w3[e], "gated", "silu") for t in tokens])
            for e in (i, j)
        ]
        cka = rbf_cka(*outputs, 0.8)
        if cka >= threshold:
            found.append(cka)
    return sum(found) / max(1, len(found)) + torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(("threshold", "shared"), [(0.0, 1), (0.6, 1), (0.0, 2), (1.1, 0)])
def test_simsmoe_compares_experts_on_the_tokens_they_share(threshold: float, shared: int) -> None:
    made = layer(cka_loss=0.5, cka_threshold=threshold, cka_shared=shared, cka_samples=T)
    plain = layer()
    plain.load_state_dict(made.state_dict())
    hidden_BSD = hidden()
    out_BSD, statistics = run(made, hidden_BSD)
    torch.testing.assert_close(out_BSD, run(plain, hidden_BSD)[0])  # the mixture is what it was
    want = 0.5 * expected_cka(made, hidden_BSD.view(T, D), threshold, shared)
    torch.testing.assert_close(statistics.loss, want)
    if threshold < 1:
        assert want > 0
        assert_same_gradients(statistics.loss, want, [hidden_BSD, *made.experts.parameters()])
    else:
        assert want == 0


def test_simsmoe_compares_the_pairs_that_share_most() -> None:
    made = layer(cka_loss=0.5, cka_threshold=0.0, cka_shared=0, cka_pairs=1, cka_samples=T)
    made.router.scores.weight.data[:2] *= 0
    made.router.scores.weight.data[:2, 0] = 50  # experts 0 and 1 take all with a positive first feature
    hidden_BSD = hidden().detach().clone()
    hidden_BSD[..., 0] = hidden_BSD[..., 0].abs() + 0.1
    _, statistics = run(made, hidden_BSD)
    w1, w2, w3 = made.experts.w1, made.experts.w2, made.experts.w3
    outputs = [
        torch.stack([reference.expert_mlp(x, w1[e], w2[e], w3[e], "gated", "silu") for x in hidden_BSD.view(T, D)])
        for e in (0, 1)
    ]
    torch.testing.assert_close(statistics.loss, 0.5 * rbf_cka(*outputs, 0.8))


def test_simsmoe_takes_no_padding() -> None:
    made = layer(cka_loss=0.5, cka_threshold=0.0, cka_shared=0, cka_samples=T)
    hidden_BSD, mask_T = hidden(), torch.arange(T) % 5 != 2
    _, statistics = run(made, hidden_BSD, mask_T=mask_T)
    want = 0.5 * expected_cka(made, hidden_BSD.view(T, D)[mask_T], 0.0, 0)
    torch.testing.assert_close(statistics.loss, want)


def test_with_s2moe_the_clean_tokens_alone_are_regularised() -> None:
    settings = {"snnl_loss": 0.3, "similarity_loss": 0.2, "cka_loss": 0.5, "cka_threshold": 0.0, "cka_samples": T}
    plain, noisy = layer(**settings), layer("s2moe_k2", **settings)
    noisy.load_state_dict(plain.state_dict(), strict=False)
    hidden_BSD = hidden()
    (_, alone), (_, both) = run(plain, hidden_BSD), run(noisy, hidden_BSD)
    torch.testing.assert_close(both.loss, alone.loss)


def test_in_evaluation_nothing_is_added() -> None:
    made = layer(snnl_loss=0.3, cka_loss=0.5, similarity_loss=0.2).eval()
    _, statistics = made(hidden(), RoutingContext())
    assert statistics.loss == 0
    assert not {"snnl_loss", "cka_loss", "similarity_loss"} & set(statistics.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snnl_temperature": 0.0}, "snnl_temperature must be positive"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"cka_samples": 1}, "cka_samples must be at least 2"),
        ({"snnl_anneal_steps": 0}, "snnl_anneal_steps must be at least 1"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegulariserOptions(**options)


def test_simsmoe_is_refused_where_no_token_has_two_experts() -> None:
    with pytest.raises(ValueError, match="experts_per_token=2"):
        resolve_moe({"method": "smoe", "experts_per_token": 1, "regularisers": {"cka_loss": 0.1}})
    for method in ("importance", "sample_similarity"):
        with pytest.raises(ValueError, match="num_experts=2"):
            resolve_moe({"method": method, "num_experts": 1, "experts_per_token": 1})
    with pytest.raises(ValueError, match="exclude each other"):
        resolve_moe({"method": "compete_smoe", "regularisers": {"cka_loss": 0.1}})
