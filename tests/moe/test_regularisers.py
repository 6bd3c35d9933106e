"""Objectives on hidden states, router and experts: the layer's loss against sums written out, in float64.

Legend: B batch, S sequence, T = B S tokens, D model, E experts, K choices per token.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
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


def shared_tokens(made: SMoELayer, hidden_TD: Tensor) -> dict[tuple[int, int], list[int]]:
    """The tokens that have both experts of each pair."""
    chosen = [reference.best(made.router.scores.weight @ x, K) for x in hidden_TD]
    pairs = itertools.combinations(range(E), 2)
    return {pair: [t for t, c in enumerate(chosen) if set(pair) <= set(c)] for pair in pairs}


def outputs_of(made: SMoELayer, hidden_TD: Tensor, expert: int, tokens: list[int]) -> Tensor:
    w1, w2, w3 = (weight[expert] for weight in (made.experts.w1, made.experts.w2, made.experts.w3))
    return torch.stack([reference.expert_mlp(hidden_TD[t], w1, w2, w3, "gated", "silu") for t in tokens])


def published_cka(first_MD: Tensor, second_MD: Tensor, sigma: float) -> Tensor:
    """The authors' formula: K = exp(-‖a - b‖² / 2σ²), HSIC(K, L) = Σ (H K H) (H L H), CKA = HSIC / √(HSIC HSIC)."""
    centre = torch.eye(len(first_MD), dtype=torch.float64) - 1 / len(first_MD)
    kernels = []
    for value_MD in (first_MD, second_MD):
        square_MM = torch.stack([torch.stack([((a - b) ** 2).sum() for b in value_MD]) for a in value_MD])
        kernels.append(centre @ torch.exp(-0.5 * square_MM / sigma**2) @ centre)
    k, other = kernels
    return (k * other).sum() / ((k * k).sum().sqrt() * (other * other).sum().sqrt())


def expected_published(
    made: SMoELayer, hidden_TD: Tensor, threshold: float, shared: float, due: list[float]
) -> tuple[Tensor, int]:
    """Σ CKA above T* over the pairs whose draw is below share / f*, and how many pairs were compared."""
    total, compared = torch.zeros((), dtype=torch.float64), 0
    for draw, ((i, j), tokens) in zip(due, shared_tokens(made, hidden_TD).items(), strict=True):
        if len(tokens) <= 2 or (shared and draw >= len(tokens) / len(hidden_TD) / shared):
            continue
        compared += 1
        outputs = [outputs_of(made, hidden_TD, expert, tokens) for expert in (i, j)]
        cka = published_cka(*(value @ made.regularisers.projection_ED.T for value in outputs), 0.8)
        total = total + (cka if cka > threshold else 0.0)
    return total, compared


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize(("threshold", "shared"), [(0.0, 0.0), (0.5, 0.1), (0.0, 0.3)])
def test_simsmoe_as_the_authors_code_has_it(threshold: float, shared: float, step: int) -> None:
    made = layer(cka_loss=0.5, cka_threshold=threshold, cka_shared=shared, cka_samples=T)
    hidden_BSD = hidden()
    _, statistics = run(made, hidden_BSD, step=step)
    generator = RoutingContext(step=step).generator(torch.device("cpu"), "due pairs")
    due = torch.rand(E * (E - 1) // 2, generator=generator).tolist()
    want, compared = expected_published(made, hidden_BSD.view(T, D), threshold, shared, due)
    assert statistics.values["compared_pairs"].item() == compared
    torch.testing.assert_close(statistics.loss, 0.5 * want)
    if want:
        inputs = [hidden_BSD, made.regularisers.projection_ED, *made.experts.parameters()]
        assert_same_gradients(statistics.loss, 0.5 * want, inputs)


def test_a_pair_is_due_once_in_f_micro_batches_worth_of_shared_tokens() -> None:
    """As often as a counter of shares that is reset above f*."""
    made = layer(cka_loss=0.5, cka_shared=4.0, cka_samples=4)
    hidden_BSD = hidden().detach()
    shares = [len(t) / T for t in shared_tokens(made, hidden_BSD.view(T, D)).values() if len(t) > 2]
    assert shares
    steps = 600
    found = [run(made, hidden_BSD, step=step)[1].values["compared_pairs"].item() for step in range(steps)]
    expected = sum(shares) / 4.0
    assert sum(found) / steps == pytest.approx(expected, abs=4 * (expected / steps) ** 0.5)


def test_small_outputs_keep_their_similarity_in_float32() -> None:
    """Kernels of absolute width are near 1 there: 1 - K would be lost in rounding."""
    made = layer(cka_loss=1.0, cka_threshold=0.0, cka_shared=0, cka_samples=T)
    made.regularisers.projection_ED.data *= 1e-3
    hidden_BSD = hidden().detach()
    exact = run(made, hidden_BSD)[1].loss.item()
    assert exact > 0.1
    assert run(made.float(), hidden_BSD.float())[1].loss.item() == pytest.approx(exact, rel=1e-4)


def expected_cka(made: SMoELayer, hidden_TD: Tensor, threshold: float, shared: int) -> Tensor:
    """Mean CKA of the pairs above T*, from each expert's own outputs on the tokens it shares."""
    found = []
    for (i, j), tokens in shared_tokens(made, hidden_TD).items():
        if len(tokens) <= shared:
            continue
        cka = rbf_cka(*(outputs_of(made, hidden_TD, expert, tokens) for expert in (i, j)), 0.8)
        if cka >= threshold:
            found.append(cka)
    return sum(found) / max(1, len(found)) + torch.zeros((), dtype=torch.float64)


BATCH_MEAN = {"cka_loss": 0.5, "cka_form": "batch_mean", "cka_samples": T}


@pytest.mark.parametrize(("threshold", "shared"), [(0.0, 1), (0.6, 1), (0.0, 2), (1.1, 0)])
def test_simsmoe_compares_experts_on_the_tokens_they_share(threshold: float, shared: int) -> None:
    made = layer(**BATCH_MEAN, cka_threshold=threshold, cka_shared=shared)
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
    made = layer(**BATCH_MEAN, cka_threshold=0.0, cka_shared=0, cka_pairs=1)
    made.router.scores.weight.data[:2] *= 0
    made.router.scores.weight.data[:2, 0] = 50  # experts 0 and 1 take all with a positive first feature
    hidden_BSD = hidden().detach().clone()
    hidden_BSD[..., 0] = hidden_BSD[..., 0].abs() + 0.1
    _, statistics = run(made, hidden_BSD)
    outputs = [outputs_of(made, hidden_BSD.view(T, D), e, list(range(T))) for e in (0, 1)]
    torch.testing.assert_close(statistics.loss, 0.5 * rbf_cka(*outputs, 0.8))


@pytest.mark.parametrize("form", ["published", "batch_mean"])
def test_simsmoe_takes_no_padding(form: str) -> None:
    made = layer(**{**BATCH_MEAN, "cka_form": form}, cka_threshold=0.0, cka_shared=0)
    hidden_BSD, mask_T = hidden(), torch.arange(T) % 5 != 2
    _, statistics = run(made, hidden_BSD, mask_T=mask_T)
    kept_TD = hidden_BSD.view(T, D)[mask_T]
    if form == "published":
        want, _ = expected_published(made, kept_TD, 0.0, 0.0, [0.0] * (E * (E - 1) // 2))
    else:
        want = expected_cka(made, kept_TD, 0.0, 0)
    assert want > 0
    torch.testing.assert_close(statistics.loss, 0.5 * want)


def test_a_model_of_an_earlier_version_keeps_the_form_it_was_trained_with(tmp_path: Path) -> None:
    """Its config.json knows no other, and its weights have no projection."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    earlier = {"cka_form": "batch_mean", "cka_loss": 0.05, "cka_shared": 4}
    moe = {"method": "simsmoe", "num_experts": 4, "expert_hidden": 4, "regularisers": earlier}
    S2MoEForCausalLM(S2MoEConfig(**sizes, moe=moe)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    del written["moe"]["regularisers"]["cka_form"]
    file.write_text(json.dumps(written))
    loaded, report = S2MoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert loaded.config.moe["regularisers"].items() >= earlier.items()
    new = resolve_moe({"method": "simsmoe", "regularisers": {"cka_sigma": 0.9}}).regularisers  # a person's, not a file
    assert (new.cka_form, new.cka_loss, new.shared()) == ("published", 0.01, 16)


def test_with_s2moe_the_clean_tokens_alone_are_regularised() -> None:
    settings = {"snnl_loss": 0.3, "similarity_loss": 0.2, "cka_loss": 0.5, "cka_threshold": 0.0, "cka_shared": 0}
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
        ({"cka_shared": -1.0}, "cka_shared must not be negative"),
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
