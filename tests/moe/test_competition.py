"""CompeteSMoE: a competition against a dense float64 reference of one token at a time, and when there is one.

Legend: B sequences, S tokens of each, T = B S tokens, D model, E experts, K choices per token.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.models.sizes import model_sizes
from s2moe.moe.competition import CompetitiveSMoELayer, competing_layers
from s2moe.moe.config import MoEConfig, resolve_moe
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.objectives.competition import distillation_loss, diversity_loss
from tests.models.decoder import tiny
from tests.models.test_causality import assert_causal
from tests.moe import reference
from tests.moe.test_layer import B, D, E, S, assert_same_gradients, experts, hidden, layer, shared

T = B * S
COEFFICIENTS = {"distillation_loss": 3.0, "diversity_loss": 0.7, "affinity_balance_loss": 0.4}
MASK_BS = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])


def competitive(k: int = 2, rate: float = 1.0, router: dict[str, Any] | None = None, **given: Any) -> SMoELayer:
    """A layer in float64 that competes in every training step, with coefficients that show."""
    rest = {name: given.pop(name) for name in ("shared_experts", "expert_form") if name in given}
    router = {"renormalise": k > 1, "balance_loss": 0.3, "z_loss": 0.2, **(router or {})}
    competition = {"rate": rate, **COEFFICIENTS, **given}
    return layer(method="compete_smoe", experts_per_token=k, router=router, competition=competition, **rest)


def cosine(u_D: Tensor, v_D: Tensor) -> Tensor:
    return u_D @ v_D / (u_D @ u_D) ** 0.5 / (v_D @ v_D) ** 0.5


def competition(
    made: SMoELayer, x_TD: Tensor, k: int, combine: str, theta: float
) -> tuple[Tensor, dict[str, Tensor], list[list[int]]]:
    """Outputs, raw losses and winners of real tokens, from the equations of moe/competition.py."""
    w1, w2, w3 = experts(made)
    outputs, winners, losses = [], [], dict.fromkeys(COEFFICIENTS, torch.zeros((), dtype=x_TD.dtype))
    mean_prob = [torch.zeros((), dtype=x_TD.dtype)] * E
    for x_D in x_TD:
        out = [reference.expert_mlp(x_D, w1[e], w2[e], w3[e], made.config.expert_form, "silu") for e in range(E)]
        affinity = torch.stack([sum(torch.log(1 + torch.exp(value)) for value in y_D) / D for y_D in out])
        q_E = reference.normalise_exp(affinity)
        p_E = reference.normalise_exp(made.router.scores.weight @ x_D)
        chosen = reference.best(affinity, k)
        total = sum(affinity[e] for e in chosen)
        outputs.append(sum((q_E[e] if combine == "softmax" else affinity[e] / total) * out[e] for e in chosen))
        winners.append(chosen)
        square = [(p_E[e] - q_E[e].detach()) ** 2 for e in range(E)]
        distance = sum(square) / E + theta * sum(square[e] for e in chosen) / k
        losses["distillation_loss"] = losses["distillation_loss"] + distance / len(x_TD)
        pairs = [cosine(out[i], out[j]) for i, j in itertools.permutations(chosen, 2)]
        if pairs:
            losses["diversity_loss"] = losses["diversity_loss"] + sum(pairs) / len(pairs) / len(x_TD)
        mean_prob = [mean + q / len(x_TD) for mean, q in zip(mean_prob, q_E, strict=True)]
    share = [sum(e in chosen for chosen in winners) / (k * len(x_TD)) for e in range(E)]
    losses["affinity_balance_loss"] = E * sum(f * p for f, p in zip(share, mean_prob, strict=True))
    return torch.stack(outputs), losses, winners


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (1, {}),
        (2, {}),
        (E, {}),
        (1, {"combine": "softmax"}),
        (3, {"combine": "softmax", "theta": 0.0}),
        (2, {"theta": 1.5, "expert_form": "mlp", "shared_experts": 1}),
        (2, {"diversity_loss": 0.0, "affinity_balance_loss": 0.0}),
        (2, {"router": {"combine": "sigmoid", "noise": "jitter", "jitter": 0.5}}),
        (2, {"router": {"capacity_factor": 0.5, "renormalise": False}}),
    ],
    ids=str,
)
def test_a_competition_equals_the_dense_reference(k: int, options: dict[str, Any], padded: bool) -> None:
    made, hidden_BSD = competitive(k, **options), hidden()
    context = RoutingContext(mask_T=MASK_BS.view(-1) if padded else None)
    out_BSD, statistics = made(hidden_BSD, context)

    real_BS = MASK_BS if padded else torch.ones_like(MASK_BS)
    x_TD = hidden_BSD[real_BS]
    combine, theta = options.get("combine", "normalised"), options.get("theta", 0.2)
    want_TD, losses, winners = competition(made, x_TD, k, combine, theta)
    want_TD = want_TD + shared(made, x_TD)
    coefficients = {name: options.get(name, value) for name, value in COEFFICIENTS.items()}
    want_loss = sum(coefficients[name] * loss for name, loss in losses.items())

    torch.testing.assert_close(out_BSD[real_BS], want_TD)
    torch.testing.assert_close(statistics.loss, want_loss)  # without the router's own balance and z-loss
    for name, loss in losses.items():
        assert (name in statistics.values) == (coefficients[name] > 0)
        if coefficients[name]:
            torch.testing.assert_close(statistics.values[name], loss.detach())
    assert statistics.values["competing"].item() == 1
    assert statistics.counts_E.tolist() == [sum(e in chosen for chosen in winners) for e in range(E)]
    routed = [reference.best(made.router.scores.weight @ x, k) for x in x_TD]
    agreement = sum(len(set(a) & set(b)) for a, b in zip(routed, winners, strict=True)) / (k * len(x_TD))
    assert statistics.values["router_agreement"].item() == pytest.approx(agreement)

    direction_TD = torch.randn_like(want_TD)
    got = (out_BSD[real_BS] * direction_TD).sum() + statistics.loss
    assert_same_gradients(got, (want_TD * direction_TD).sum() + want_loss, made, hidden_BSD)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_without_a_competition_it_is_the_plain_layer(k: int, train: bool) -> None:
    router = {"renormalise": k > 1, "balance_loss": 0.3, "z_loss": 0.2}
    made = competitive(k, rate=0.0 if train else 1.0).train(train)
    plain = layer(experts_per_token=k, router=router).train(train)
    plain.load_state_dict(made.state_dict())
    hidden_BSD = hidden()
    (out_BSD, statistics), (want_BSD, want) = made(hidden_BSD), plain(hidden_BSD)
    torch.testing.assert_close(out_BSD, want_BSD)
    torch.testing.assert_close(statistics.loss, want.loss)
    assert torch.equal(statistics.counts_E, want.counts_E)
    extra = set(statistics.values) - set(want.values)
    assert extra == ({"competing", "router_agreement", *COEFFICIENTS} if train else set())
    assert all(statistics.values[name].item() == 0 for name in extra)
    torch.testing.assert_close({name: statistics.values[name] for name in want.values}, want.values)


@pytest.mark.parametrize(
    "given", [{}, {"diversity_loss": 0.0}, {"router": {"capacity_factor": 1.0, "noise": "shazeer"}}], ids=str
)
def test_every_training_step_reports_the_same_figures(given: dict[str, Any]) -> None:
    made, keys, competing = competitive(rate=0.5, **given), set(), set()
    for step in range(12):
        _, statistics = made(hidden(), RoutingContext(step=step))
        keys.add(tuple(statistics.values))
        competing.add(statistics.values["competing"].item())
    assert competing == {0.0, 1.0}
    assert len(keys) == 1


def test_regularisers_go_on_in_a_competition() -> None:
    """The same terms, on the router's distribution, with the same names at every step."""
    given = {"gate_importance_loss": 0.5, "similarity_loss": 0.3}
    made = layer(method="compete_smoe", competition={"rate": 1.0, **COEFFICIENTS}, regularisers=given)
    plain = layer(method="compete_smoe", competition={"rate": 0.0, **COEFFICIENTS}, regularisers=given)
    bare = layer(method="compete_smoe", competition={"rate": 1.0, **COEFFICIENTS})
    hidden_BSD = hidden()
    statistics, normal, without = (one(hidden_BSD)[1] for one in (made, plain, bare))
    assert tuple(statistics.values) == tuple(normal.values)
    for name in ("gate_importance_loss", "similarity_loss"):
        torch.testing.assert_close(statistics.values[name], normal.values[name])
    added = 0.5 * normal.values["gate_importance_loss"] + normal.values["similarity_loss"]
    torch.testing.assert_close(statistics.loss.detach(), without.loss.detach() + added)


@pytest.mark.parametrize("filling", [3.0, -40.0])
def test_padding_has_no_part_in_a_competition(filling: float) -> None:
    made, context = competitive(), RoutingContext(mask_T=MASK_BS.view(-1))
    real_BSD = hidden().detach()
    found = [made(torch.where(MASK_BS[..., None], real_BSD, value), context) for value in (0.0, filling)]
    (out_BSD, first), (other_BSD, second) = found
    torch.testing.assert_close(other_BSD[MASK_BS], out_BSD[MASK_BS])
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(second.values, first.values)
    assert torch.equal(second.counts_E, first.counts_E)


def test_a_competition_of_padding_alone_stays_finite() -> None:
    made, hidden_BSD = competitive(), hidden()
    out_BSD, statistics = made(hidden_BSD, RoutingContext(mask_T=torch.zeros(T, dtype=torch.bool)))
    assert statistics.loss.item() == 0
    assert statistics.counts_E.tolist() == [0] * E
    (out_BSD.sum() + statistics.loss).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (hidden_BSD, *made.parameters()))


def test_the_selection_bias_follows_the_routers_own_choice() -> None:
    """Inference is the router's: its bias is to balance that, not what won a competition."""
    made, hidden_BSD = competitive(router={"bias_update_rate": 0.1}), hidden()
    with torch.no_grad():
        made.router.bias_E.copy_(torch.tensor([0.9, 0.0, 0.0, 0.0]))
    _, statistics = made(hidden_BSD)
    probability = [reference.normalise_exp(made.router.scores.weight @ x) for x in hidden_BSD.reshape(-1, D)]
    routed = [reference.best(p + made.router.bias_E, 2) for p in probability]
    assert statistics.feedback.tolist() == [sum(e in chosen for chosen in routed) for e in range(E)]
    assert statistics.counts_E.tolist() != statistics.feedback.tolist()


@pytest.mark.parametrize("k", [None, 1, 3])
def test_a_probe_sees_the_winners_and_the_routers_distribution(k: int | None) -> None:
    class Recorder:
        def record(self, layer: SMoELayer, hidden_TD: Tensor, routing: Routing, context: RoutingContext) -> None:
            seen.append((hidden_TD, routing))

    made, hidden_BSD, seen = competitive(), hidden(), []
    _, statistics = made(hidden_BSD, RoutingContext(probe=Recorder(), experts_per_token=k))
    ((hidden_TD, routing),) = seen
    torch.testing.assert_close(hidden_TD, hidden_BSD.view(T, D))
    _, _, winners = competition(made, hidden_TD, k or 2, "normalised", 0.2)
    assert routing.expert_N.view(T, -1).tolist() == winners
    prob_TE = torch.stack([reference.normalise_exp(made.router.scores.weight @ x) for x in hidden_TD])
    torch.testing.assert_close(routing.prob_TE, prob_TE)
    entropy = -(prob_TE * prob_TE.log()).sum() / T
    assert statistics.values["router_entropy"].item() == pytest.approx(entropy.item())


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_every_parameter_gets_a_gradient_in_every_step(rate: float) -> None:
    """If only zero: ZeRO-3 keeps a missing one from the step before."""
    made = competitive(rate=rate, distillation_loss=0.0, router={"noise": "shazeer"})
    out_BSD, statistics = made(hidden())
    (out_BSD.sum() + statistics.loss).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() == (rate == 0 or "router" not in name), name


def test_distillation_alone_makes_the_router_agree_with_the_competition() -> None:
    """Over steps of gradient descent on one batch, at k = 1 as well, where the weights are constant."""
    made = competitive(1, diversity_loss=0.0, affinity_balance_loss=0.0).float()
    hidden_BSD = torch.randn(8, 16, D)
    optimizer = torch.optim.Adam(made.router.parameters(), lr=0.02)
    agreement = []
    for _ in range(150):
        optimizer.zero_grad()
        _, statistics = made(hidden_BSD)
        statistics.loss.backward()
        optimizer.step()
        agreement.append(statistics.values["router_agreement"].item())
    assert agreement[-1] > agreement[0] + 0.2


# --- the objectives ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cosine"),
    [
        ([[1.0, 0.0], [0.0, 3.0]], 0.0),
        ([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]], 1.0),  # K² in the denominator would give 2/3
        ([[1.0, 0.0], [-2.0, 0.0]], -1.0),
        ([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], 2 * math.sqrt(0.5) / 3),
        ([[1.0, 2.0]], 0.0),
        ([[0.0, 0.0], [1.0, 1.0]], 0.0),
    ],
)
def test_diversity_of_known_outputs(rows: list[list[float]], cosine: float) -> None:
    assert diversity_loss(torch.tensor([rows, rows])).item() == pytest.approx(cosine, abs=1e-6)


def test_an_output_of_zero_gets_no_gradient() -> None:
    out_TKD = torch.tensor([[[0.0, 0.0], [1.0, 2.0]], [[1.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    diversity_loss(out_TKD).backward()
    assert not out_TKD.grad[0].any()
    assert out_TKD.grad[1].any()
    assert torch.isfinite(out_TKD.grad).all()


def test_distillation_of_known_distributions() -> None:
    prob_TE, target_TE = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.3, 0.6]])
    winner_TK = torch.tensor([[2, 1]])
    over_all, over_winners = (0.16 + 0.0 + 0.16) / 3, (0.16 + 0.0) / 2
    for theta in (0.0, 0.2, 1.0):
        loss = distillation_loss(prob_TE, target_TE, winner_TK, theta)
        assert loss.item() == pytest.approx(over_all + theta * over_winners)


# --- when there is one ---------------------------------------------------------------------------


def schedule(steps: int, layers: int, seed: int = 0, context: RoutingContext | None = None, **given: Any) -> list[set]:
    """The competing layers of every step."""
    moe = {name: given.pop(name) for name in ("every", "first_dense") if name in given}
    config: MoEConfig = resolve_moe({"method": "compete_smoe", "competition": given, **moe})
    context = replace(context or RoutingContext(), layers=layers, seed=seed)
    return [competing_layers(config, replace(context, step=step)) for step in range(steps)]


@pytest.mark.parametrize("rate", [0.07, 0.5])
def test_each_layer_competes_at_the_rate(rate: float) -> None:
    steps, layers = 3000, 6
    found = schedule(steps, layers, rate=rate, max_layers=layers)
    margin = 4.5 * math.sqrt(rate * (1 - rate) / steps)
    for number in range(layers):
        assert sum(number in step for step in found) / steps == pytest.approx(rate, abs=margin)
    # Layers draw independently: pairs meet as often as rate² says.
    together = sum({0, 1} <= step for step in found) / steps
    assert together == pytest.approx(rate**2, abs=4.5 * math.sqrt(rate**2 / steps))


def test_the_cap_holds_and_prefers_no_layer() -> None:
    steps, layers = 2000, 8
    found = schedule(steps, layers, rate=0.7, max_layers=3)
    assert max(map(len, found)) == 3
    mean = sum(map(len, found)) / steps / layers
    for number in range(layers):
        assert sum(number in step for step in found) / steps == pytest.approx(mean, abs=4.5 * 0.5 / math.sqrt(steps))


def test_rates_of_none_and_all() -> None:
    assert schedule(50, 4, rate=0.0) == [set()] * 50
    assert schedule(50, 3, rate=1.0) == [{0, 1, 2}] * 50


def test_the_published_schedule_barely_feels_the_cap() -> None:
    """16 layers at 0.07, at most 3: the mean rate of min(Binomial(16, 0.07), 3) / 16 is 0.0689."""
    found = schedule(4000, 16)
    chance = [math.comb(16, n) * 0.07**n * 0.93 ** (16 - n) for n in range(17)]
    mean = sum(min(n, 3) * c for n, c in enumerate(chance)) / 16
    assert sum(map(len, found)) / 4000 / 16 == pytest.approx(mean, abs=4.5 * math.sqrt(0.07 / 64000))


def test_training_counts_the_work_of_competitions() -> None:
    """All experts instead of k, in so many layers of an average step; nothing of it in inference."""
    for competition, layers in (
        ({"rate": 1.0}, 3),
        ({"rate": 1.0, "max_layers": 1}, 1),
        ({"rate": 0.5, "max_layers": 2, "warm_up": 0.25}, 0.75 * (3 / 8 * 1 + 3 / 8 * 2 + 1 / 8 * 2)),
        ({"enabled": False}, 0),
    ):
        config = tiny("compete_smoe", moe_competition=competition).config
        sizes = model_sizes(config)
        others = (4 - 2) * 3 * 16 * 8  # experts beyond the two, each of three matrices of 16 by 8
        assert sizes.training_macs_per_token - sizes.macs_per_token == round(layers * others)
        assert sizes.macs_per_token == model_sizes(tiny().config).macs_per_token


def test_only_sparse_layers_are_drawn_and_capped() -> None:
    found = schedule(60, 7, rate=1.0, max_layers=2, every=2, first_dense=1)
    assert set().union(*found) == {2, 4, 6}
    assert {len(step) for step in found} == {2}


def test_it_depends_on_seed_and_step_alone() -> None:
    """Ranks, micro-batches and layers agree; a resumed run goes on as an uninterrupted one."""
    plan = schedule(200, 5, rate=0.3)
    assert plan == schedule(200, 5, rate=0.3)
    for changed in ({"microbatch": 7}, {"layer": 4}, {"copy": 1}, {"sequences": 3}, {"steps": 999}):
        assert schedule(200, 5, rate=0.3, context=RoutingContext(**changed)) == plan
    assert schedule(200, 5, seed=1, rate=0.3) != plan
    assert len({frozenset(step) for step in plan}) > 5


def test_no_competition_before_the_warm_up_is_over() -> None:
    plan = schedule(40, 4, rate=0.5, max_layers=4)
    for found in (
        schedule(40, 4, rate=0.5, max_layers=4, warm_up=0.25, context=RoutingContext(steps=40)),
        schedule(40, 4, rate=0.5, max_layers=4, warm_up=0.25, schedule_steps=40, context=RoutingContext(steps=7)),
    ):
        assert found == [set()] * 10 + plan[10:]
    with pytest.raises(ValueError, match=r"competition\.warm_up needs the number of training steps"):
        schedule(1, 4, warm_up=0.25)


def test_the_models_layers_follow_the_schedule_in_all_micro_batches() -> None:
    config = {"rate": 0.5, "max_layers": 1}
    model = tiny("compete_smoe", moe_competition=config)
    ids, seen = torch.randint(19, (2, 6)), set()
    for step in range(12):
        want = competing_layers(model.config.moe_config(), RoutingContext(seed=2, step=step, layers=3))
        for microbatch in (0, 5):
            out = model(ids, context=RoutingContext(seed=2, step=step, microbatch=microbatch))
            assert {s.layer for s in out.routing if s.values["competing"]} == want
        seen |= want
    assert len(seen) > 1


# --- in a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [RoutingContext(seed=3, step=5), None], ids=["context", "none"])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_activation_checkpointing_changes_nothing(rate: float, context: RoutingContext | None) -> None:
    models = [tiny("compete_smoe", moe_competition={"rate": rate, **COEFFICIENTS}) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].activation_checkpointing_enable()
    ids, results = torch.randint(19, (2, 8)), []
    for model in models:
        assert any(isinstance(module, CompetitiveSMoELayer) for module in model.modules())
        for step in range(3):
            at = None if context is None else replace(context, step=context.step + step)
            out = model(ids, labels=ids, context=at)
            out.loss.backward()
            results.append((out.loss.detach(), [s.values["competing"].item() for s in out.routing]))
    assert {value for _, competing in results for value in competing} == ({0.0, 1.0} if rate < 1 else {1.0})
    for (loss, competing), (again, repeated) in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(again, loss)
        assert competing == repeated
    for (name, left), right in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("combine", ["normalised", "softmax"])
def test_a_competition_is_causal_in_training_too(combine: str) -> None:
    model = tiny("compete_smoe", moe_competition={"rate": 1.0, "combine": combine}).double()
    assert_causal(model, context=RoutingContext(step=1))
    assert_causal(model.eval())


def test_half_precision_keeps_its_dtype_and_trains() -> None:
    model = tiny("compete_smoe", moe_competition={"rate": 1.0, **COEFFICIENTS}).bfloat16()
    ids = torch.randint(19, (2, 8))
    out = model(ids, labels=ids, context=RoutingContext())
    assert out.logits.dtype == torch.bfloat16
    assert out.aux_loss.dtype == torch.float32
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_autocast_scores_affinities_in_full_precision() -> None:
    """Half-precision experts, but sums, softmax and cosines in float32: near the whole computation in float32."""
    made, hidden_BSD = competitive().float(), hidden().float()
    _, want = made(hidden_BSD)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = made(hidden_BSD)
    for name in COEFFICIENTS:
        assert got.values[name].dtype == torch.float32
        assert got.values[name].item() == pytest.approx(want.values[name].item(), rel=0.05, abs=2e-3)


# --- configuration -------------------------------------------------------------------------------


def test_the_preset_is_the_published_one() -> None:
    config = resolve_moe({"method": "compete_smoe"})
    options = config.competition
    assert options.enabled
    assert (options.rate, options.warm_up, options.max_layers, options.theta) == (0.07, 0.0, 3, 0.2)
    assert (options.distillation_loss, options.diversity_loss, options.affinity_balance_loss) == (0.001, 0.005, 0.005)
    router = config.router_options()
    assert (router.balance_loss, router.z_loss, router.renormalise) == (0.01, 0.001, True)
    assert not resolve_moe({"method": "smoe"}).competition.enabled


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stochastic": {"enabled": True}}, "exclude each other"),
        ({"method": "s2moe", "competition": {"enabled": True}}, "exclude each other"),
        ({"competition": {"rate": 1.5}}, r"competition: rate must lie in \[0, 1\]"),
        ({"competition": {"warm_up": 1.0}}, r"competition: warm_up must lie in \[0, 1\)"),
        ({"competition": {"max_layers": 0}}, r"competition: max_layers must be at least 1"),
        ({"competition": {"combine": "softmx"}}, r"competition\.combine: must be one of normalised, softmax"),
        ({"competition": {"ratio": 0.1}}, r"competition: unknown key 'ratio'.*'rate'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_moe({"method": "compete_smoe", **given})


def test_a_router_without_linear_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2moe.moe.routers.base import ROUTERS
    from s2moe.moe.routers.topk import TopKRouter

    class Other(TopKRouter):
        """A router of another name."""

    monkeypatch.setitem(ROUTERS, "other", Other)
    with pytest.raises(ValueError, match=r"distils .* which the router 'other' has not: set router\.name=topk"):
        resolve_moe({"method": "smoe", "competition": {"enabled": True}, "router": {"name": "other"}})
