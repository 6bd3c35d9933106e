"""V-MoE's router, its capacity and its priorities, against the equations and the published vectors.

Legend: B images, S tokens of each, T = B S tokens, D model, G routing groups, E experts, K choices per token.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEConfig
from s2moe.moe.capacity import buffer_places, group_capacity, keep_by_priority
from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import build_layer
from s2moe.moe.routers.vmoe import VMoEOptions, VMoERouter, group_sums
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.objectives.balance import cv_squared
from tests.moe import reference

B, S, D, E = 6, 5, 8, 4


def hidden(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B * S, D, generator=generator, dtype=torch.float64) + 0.5


def router(k: int = 2, **options: Any) -> VMoERouter:
    made = VMoERouter(D, E, k, VMoEOptions(**options)).double()
    torch.nn.init.normal_(made.scores.weight, generator=torch.Generator().manual_seed(2))
    return made


# --- the equations, one token after another ------------------------------------------------------


def places_one_by_one(
    gate_TE: list[list[float]], chosen_TK: list[list[int]], k: int, order: list[int]
) -> dict[tuple[int, int], int]:
    """(token, expert): its place in the expert's buffer. First choices of all tokens in order, then second ones."""
    filled = [0] * len(gate_TE[0])
    place = {}
    for j in range(k):
        for t in order:
            expert = chosen_TK[t][j]
            place[t, expert] = filled[expert]
            filled[expert] += 1
    return place


def answer(
    x_TD: Tensor, w_ED: Tensor, noise_TE: Tensor, k: int, options: VMoEOptions, factor: float | None
) -> tuple[dict[tuple[int, int], Tensor], dict[str, Tensor]]:
    """{(token, expert): weight} of what is kept, and the losses of one routing group."""
    experts = len(w_ED)
    clean = [w_ED @ x for x in x_TD]
    noisy = [c + n * options.noise / experts for c, n in zip(clean, noise_TE, strict=True)]
    gates = [reference.normalise_exp(n) for n in noisy]
    chosen = [reference.best(g, k) for g in gates]
    score = {"none": lambda t: 0.0, "max": lambda t: gates[t][chosen[t][0]].item()}
    score["sum"] = lambda t: sum(gates[t][e].item() for e in chosen[t])
    order = sorted(range(len(x_TD)), key=lambda t: -score[options.priority](t))
    place = places_one_by_one([g.tolist() for g in gates], chosen, k, order)
    capacity = math.inf
    if factor is not None:
        exact = k * len(x_TD) * factor / experts
        capacity = round(exact) if options.rounding == "round" else 4 * math.ceil(math.ceil(exact - 1e-9) / 4)
    kept = {(t, e): gates[t][e] for (t, e), number in place.items() if number < capacity}

    importance = sum(reference.normalise_exp(c) for c in clean)
    load = torch.zeros(experts, dtype=torch.float64)
    for c, n in zip(clean, noisy, strict=True):
        threshold = n[reference.best(n, k)[-1]]
        load = load + 1 - reference.normal_cdf((threshold - c) * experts / options.noise)
    losses = {
        "importance_loss": 0.005 * reference.cv_squared(list(importance)),
        "load_loss": 0.005 * reference.cv_squared(list(load)),
    }
    return kept, losses


def pairs(routing: Routing) -> dict[tuple[int, int], Tensor]:
    names = zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)
    return dict(zip(names, routing.weight_N, strict=True))


@pytest.mark.parametrize("priority", ["none", "max", "sum"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(
    "given",
    [
        {"capacity_factor": 0.6},
        {"capacity_factor": 1.05, "rounding": "multiple_of_4"},
        {"capacity_factor": 0.7, "group_size": 2, "noise": 2.0},
        {"capacity_factor": 0.7, "group_size": 4},  # the last group is smaller
        {"capacity_factor": None},
    ],
    ids=["round", "multiple of 4", "groups", "uneven groups", "dropless"],
)
def test_weights_losses_and_gradients_equal_the_equations(given: dict[str, Any], k: int, priority: str) -> None:
    if (k, priority) == (E, "sum"):
        return  # the sum of all weights is 1 for every token: rounding would order them
    made = router(k, priority=priority, **given)
    context = RoutingContext(seed=4, step=7, sequences=B)
    x_TD = hidden().requires_grad_()
    routing = made(x_TD, context)
    noise_TE = torch.randn(B * S, E, generator=context.generator(x_TD.device, "router noise"), dtype=torch.float64)

    exact_TD, exact_ED = (value.detach().clone().requires_grad_() for value in (x_TD, made.scores.weight))
    images = made.options.group_size or B
    wanted, terms = {}, []
    for first in range(0, B, images):
        own = slice(first * S, min(first + images, B) * S)
        kept, losses = answer(exact_TD[own], exact_ED, noise_TE[own], k, made.options, made.options.capacity_factor)
        wanted |= {(t + own.start, e): weight for (t, e), weight in kept.items()}
        terms.append(losses)
    found = pairs(routing)
    assert found.keys() == wanted.keys()
    assert routing.token_N.tolist() == sorted(routing.token_N.tolist())
    for pair, weight in wanted.items():
        torch.testing.assert_close(found[pair], weight)
    mean = {name: sum(group[name] for group in terms) / len(terms) for name in terms[0]}
    for name, loss in mean.items():
        torch.testing.assert_close(routing.losses[name], loss, rtol=1e-7, atol=1e-12)
    assert routing.load_E.sum() == B * S * k
    if made.options.capacity_factor is not None:
        assert routing.stats["dropped_fraction"].item() == pytest.approx(1 - len(wanted) / (B * S * k))
        alone = B * S - len({t for t, _ in wanted})
        assert routing.stats["tokens_without_expert"].item() == pytest.approx(alone / (B * S))

    direction = {pair: torch.randn((), dtype=torch.float64) for pair in wanted}
    ours = sum(direction[pair] * found[pair] for pair in direction) + 100 * sum(routing.losses.values())
    theirs = sum(direction[pair] * wanted[pair] for pair in direction) + 100 * sum(mean.values())
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(x_TD.grad, exact_TD.grad, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(made.scores.weight.grad, exact_ED.grad, rtol=1e-6, atol=1e-10)


# --- published and calculated vectors -------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "rounding", "want"),
    [(1.05, "round", 105), (1.05, "multiple_of_4", 108), (4.0, "round", 400), (4.0, "multiple_of_4", 400)],
)
def test_capacity_of_eight_images_of_fifty_tokens(factor: float, rounding: str, want: int) -> None:
    assert group_capacity(factor, 2, 8, torch.tensor([8 * 50]), rounding).tolist() == [want]


@pytest.mark.parametrize("rounding", ["round", "multiple_of_4"])
def test_an_expert_has_a_place_in_every_group_with_a_token(rounding: str) -> None:
    least = {"round": 1, "multiple_of_4": 4}[rounding]
    assert group_capacity(0.01, 2, 8, torch.tensor([50, 1, 0]), rounding).tolist() == [least, least, 0]


@pytest.mark.parametrize("given", [{}, {"group_size": 1}, {"group_size": 4}], ids=str)
def test_a_capacity_of_nothing_is_refused_in_training_and_one_place_at_inference(given: dict[str, Any]) -> None:
    """Else no expert would compute or learn anything, and nobody would notice."""
    tokens = min(given.get("group_size", B), B) * S
    factor = 0.5 * E / (2 * tokens)  # half a place, which is rounded to none
    made = router(capacity_factor=factor, inference_capacity=factor, **given)
    context = RoutingContext(sequences=B)
    with pytest.raises(
        ValueError, match=rf"leaves an expert 0\.5 places of a routing group of {tokens} tokens.*group_siz"
    ):
        made(hidden(), context)
    made.eval()
    routing = made(hidden(), context)
    assert routing.stats["capacity"].item() == 1
    assert 0 < routing.counts_E.max().item() <= -(-B * S // tokens)  # one in each group
    made = router(capacity_factor=factor * 1.01, **given)
    assert made(hidden(), context).counts_E.sum() > 0  # rounded to one
    router(capacity_factor=factor, rounding="multiple_of_4", **given)(hidden(), context)


GATES = torch.tensor([[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])
VANILLA = [{(0, 0), (2, 1)}, {(0, 1), (2, 2)}, {(2, 0), (0, 2)}]
PRIORITIZED = [{(0, 1), (2, 2)}, {(0, 0), (2, 1)}, {(2, 0), (0, 2)}]


@pytest.mark.parametrize(("prioritized", "want"), [(False, VANILLA), (True, PRIORITIZED)], ids=["vanilla", "bpr"])
def test_places_of_the_released_code_s_example(prioritized: bool, want: list[set[tuple[int, int]]]) -> None:
    gate_TK, expert_TK = GATES.topk(2)
    order_N = None
    if prioritized:
        order_T = gate_TK[:, 0].argsort(descending=True, stable=True)
        order_N = torch.cat((order_T, order_T + 3))
    place_TK = buffer_places(expert_TK, 3, order_N)
    assert [set(zip(e, p, strict=True)) for e, p in zip(expert_TK.tolist(), place_TK.tolist(), strict=True)] == want
    keep_TK = keep_by_priority(
        expert_TK, 3, torch.tensor([2.0]), torch.zeros(3, dtype=torch.int64), gate_TK[:, 0] if prioritized else None
    )
    for token, row in enumerate(want):
        found = {e for e, kept in zip(expert_TK[token].tolist(), keep_TK[token].tolist(), strict=True) if kept}
        assert found == {e for e, place in row if place < 2}


def test_loss_vectors() -> None:
    """E = 3, k = 1, noise 1/3, the noisy logits being the clean ones."""
    made = VMoERouter(3, 3, 1, VMoEOptions()).double()
    torch.nn.init.eye_(made.scores.weight)
    clean_TE = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    raw = made._losses(clean_TE, clean_TE.amax(-1, keepdim=True), torch.ones(2, 1), 2)
    assert clean_TE.softmax(-1).sum(0).tolist() == pytest.approx([0.755272, 0.489457, 0.755272], abs=1e-6)
    assert raw["importance_loss"].item() == pytest.approx(0.035329, abs=1e-6)
    chance_TE = torch.special.ndtr((clean_TE - 2) * 3)
    assert chance_TE[0].tolist() == pytest.approx([0.5, 0.00134990, 9.9e-10], rel=1e-2)
    assert raw["load_loss"].item() == pytest.approx(0.491955, abs=1e-6)


# --- priorities, groups, inference ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_batch_prioritized_routing_equals_a_loop_with_ties(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate_TE = torch.randint(1, 5, (23, E), generator=generator) / 10  # many equal scores: the earlier token goes first
    chosen_TK = [sorted(range(E), key=lambda e, row=row: -row[e])[:k] for row in gate_TE.tolist()]
    score_T = gate_TE.amax(-1)
    order = sorted(range(23), key=lambda t: -score_T[t].item())
    place = places_one_by_one(gate_TE.tolist(), chosen_TK, k, order)
    expert_TK = torch.tensor(chosen_TK)
    for capacity in (0, 1, 3, 9, 100):
        keep_TK = keep_by_priority(expert_TK, E, torch.tensor([capacity]), torch.zeros(23, dtype=torch.int64), score_T)
        want = [[place[t, e] < capacity for e in row] for t, row in enumerate(chosen_TK)]
        assert keep_TK.tolist() == want


def test_max_and_sum_are_the_same_for_one_expert_and_differ_for_two() -> None:
    kept = {}
    for k in (1, 2):
        for priority in ("max", "sum"):
            made = router(k, priority=priority, capacity_factor=0.4)
            kept[k, priority] = set(pairs(made(hidden(), RoutingContext(sequences=B))))
    assert kept[1, "max"] == kept[1, "sum"]
    assert kept[2, "max"] != kept[2, "sum"]


def test_padding_takes_no_place_and_no_part() -> None:
    """The answer for real tokens is that of a batch without the padding (no noise, whose draws would move)."""
    made = router(priority="max", capacity_factor=0.5, noise=0.0, load_loss=0.0, group_size=2)
    x_BSD = hidden().view(B, S, D)
    mask_BS = (torch.arange(S) < 4).expand(B, S)
    plain = made(x_BSD[:, :4].reshape(-1, D), RoutingContext(sequences=B))
    padded = made(x_BSD.reshape(-1, D), RoutingContext(sequences=B, mask_T=mask_BS.reshape(-1)))
    moved = {(t // S * 4 + t % S, e): weight.item() for (t, e), weight in pairs(padded).items()}
    assert moved == pytest.approx({pair: weight.item() for pair, weight in pairs(plain).items()})
    torch.testing.assert_close(padded.losses, plain.losses)
    for name in ("capacity", "dropped_fraction", "tokens_without_expert"):
        torch.testing.assert_close(padded.stats[name], plain.stats[name])


def test_group_sums_of_an_uneven_last_group() -> None:
    value_TX = torch.arange(14.0).view(7, 2)
    assert group_sums(value_TX, 3).tolist() == [[6.0, 9.0], [24.0, 27.0], [12.0, 13.0]]
    torch.testing.assert_close(cv_squared(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])), torch.tensor([1 / 6, 0.0]))


def test_evaluation_has_no_noise_no_losses_and_no_capacity_by_default() -> None:
    made = router(capacity_factor=0.1).eval()
    routing = made(hidden(), RoutingContext(sequences=B))
    again = made(hidden(), RoutingContext(sequences=B, step=9))
    assert routing.losses == {}
    assert len(routing.token_N) == 2 * B * S
    assert routing.choices == 2
    assert torch.equal(routing.weight_N, again.weight_N)
    prob_TE = (hidden() @ made.scores.weight.T).softmax(-1)
    torch.testing.assert_close(routing.weight_N.view(-1, 2), prob_TE.topk(2).values)  # not renormalised


@pytest.mark.parametrize("priority", ["none", "max", "sum"])
def test_capacity_at_inference_drops_less_the_higher_it_is(priority: str) -> None:
    made = router().eval()
    dropped, before = [], set()
    for factor in (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 4.0):
        made.set_inference(factor, priority)
        routing = made(hidden(), RoutingContext(sequences=B))
        kept = set(pairs(routing))
        assert before <= kept  # a higher capacity takes nobody's place away
        before = kept
        dropped.append(routing.stats["dropped_fraction"].item())
        assert routing.stats["capacity"].item() == round(factor * 2 * B * S / E)
        assert routing.counts_E.max().item() <= routing.stats["capacity"].item()
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] > 0.8
    assert dropped[-1] == 0
    made.set_inference(math.inf, None)
    assert "dropped_fraction" not in made(hidden(), RoutingContext(sequences=B)).stats


def test_priority_keeps_the_surest_tokens() -> None:
    made = router(k=1).eval()
    made.set_inference(0.3, "max")
    routing = made(hidden(), RoutingContext(sequences=B))
    top_T, expert_T = routing.prob_TE.max(-1)
    kept = set(routing.token_N.tolist())
    for expert in range(E):
        own = [t for t in range(B * S) if expert_T[t] == expert]
        inside = [top_T[t].item() for t in own if t in kept]
        outside = [top_T[t].item() for t in own if t not in kept]
        assert not outside or min(inside) >= max(outside)


def test_fewer_or_more_experts_at_inference_scale_the_capacity() -> None:
    made = router().eval()
    made.set_inference(1.0, "none")
    for k in (1, 3):
        routing = made(hidden(), RoutingContext(sequences=B, experts_per_token=k))
        assert routing.stats["capacity"].item() == round(k * B * S / E)
        assert routing.load_E.sum() == k * B * S


def test_noise_is_repeated_by_its_key_alone() -> None:
    made = router()
    first, again, other = (made(hidden(), RoutingContext(sequences=B, step=step)).prob_TE for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    clean_TE = hidden() @ made.scores.weight.T
    many = torch.cat(
        [
            (p := made(hidden(), RoutingContext(sequences=B, step=s)).prob_TE).log()
            - p.log().mean(-1, keepdim=True)
            - (clean_TE - clean_TE.mean(-1, keepdim=True))
            for s in range(50)
        ]
    )
    assert many.std().item() == pytest.approx(1 / E * (1 - 1 / E) ** 0.5, rel=0.03)  # centred over E


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1.0}, "noise"),
        ({"noise": 0.0}, "load_loss=0"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"inference_capacity": -1.0}, "inference_capacity"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMoEOptions(**options)


def test_unknown_priority_is_refused() -> None:
    with pytest.raises(ValueError, match="priority"):
        router().set_inference(None, "best")
    with pytest.raises(ValueError, match=r"router\.priority"):
        resolve_moe({"method": "vmoe", "router": {"priority": "best"}})


@pytest.mark.parametrize(
    ("given", "message"),
    [({"priority": "max"}, "priority=none"), ({"inference_capacity": 1.0}, "inference_capacity=null")],
)
def test_a_causal_model_refuses_what_looks_at_other_tokens(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2MoEConfig(moe={"method": "vmoe", "router": given})
    assert S2MoEConfig(moe={"method": "vmoe"}).moe["router"]["capacity_factor"] == 1.05


def test_all_experts_start_alike_only_where_asked() -> None:
    for shared in (True, False):
        layer = build_layer(resolve_moe({"method": "vmoe", "expert_hidden": 8, "shared_start": shared}), D, 0)
        for weight in (layer.experts.w1, layer.experts.w2):
            assert (weight == weight[:1]).all() == shared
