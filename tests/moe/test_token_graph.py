"""Similarity-Aware and Attention-Aware routing against their equations, one pair of tokens (i, j) at a time.

Legend: B sequences, S tokens of each, T = B S tokens, D model, E experts, K choices, H heads, G key/value heads,
C head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import build_layer
from s2moe.moe.routers import ROUTERS, Router, attention_aware
from s2moe.moe.routing import AttentionState, Routing, RoutingContext
from tests.moe import reference
from tests.moe.test_topk_router import assert_same_gradients

B, S, D, E = 2, 5, 5, 4
H, G, C = 4, 2, 3
T = B * S
MASK_BS = torch.tensor([[False, False, True, True, True], [True, False, True, True, False]])
Mixing = Callable[[int, int], dict[int, Tensor]]  # sequence b and position i to the weights A_ij of positions j


def similarity_router(k: int = 2, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["similarity_aware"]
    made = cls(D, E, k, cls.Options(**{"temperature": 0.5, **options})).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.train(train)


def attention_router(k: int = 2, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["attention_aware"]
    made = cls(D, E, k, cls.Options(**{"num_attention_heads": H, **options})).double()
    torch.nn.init.normal_(made.scores.weight)
    made.entropy_H.copy_(torch.tensor([1.0, 0.9, 0.3, 0.7]))
    return made.train(train)


def hidden() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def attention_state() -> AttentionState:
    shapes = ((B, H, S, C), (B, G, S, C), (B, G, S, C), (B, S, H, C))
    return AttentionState(*(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes), 0.6)


def context(masked: bool, **given: Any) -> RoutingContext:
    return RoutingContext(sequences=B, mask_T=MASK_BS.reshape(-1) if masked else None, **given)


def may_see(b: int, i: int, masked: bool) -> list[int]:
    """j ≤ i that is not padding."""
    return [j for j in range(i + 1) if j == i or not masked or MASK_BS[b, j]]


def normalised(weight: dict[int, Tensor]) -> dict[int, Tensor]:
    return {j: w / sum(weight.values()) for j, w in weight.items()}


def entropy(prob: Sequence[Tensor] | Tensor) -> Tensor:
    return -sum(p * torch.log(p) for p in prob)


def distributions(made: Router, u_TD: Tensor) -> list[list[Tensor]]:
    """p of each position of each sequence."""
    return [[reference.normalise_exp(made.scores.weight @ u) for u in u_SD] for u_SD in u_TD.view(B, S, D)]


def similarity(made: Router, u_TD: Tensor, masked: bool) -> Mixing:
    """S_ij ∝ exp(u_i W_s u_jᵀ / τ)."""
    options, u_BSD = made.options, u_TD.view(B, S, D)
    w_s_DD = made.query_RD.T / D if made.key_RD is None else made.query_RD.T @ made.key_RD / options.rank
    p = distributions(made, u_TD)

    def row(b: int, i: int) -> dict[int, Tensor]:
        allowed = may_see(b, i, masked)
        if options.window is not None:
            allowed = [j for j in allowed if i - j < options.window]
        if options.entropy_bound:
            allowed = [j for j in allowed if j == i or entropy(p[b][j]) <= entropy(p[b][i])]
        score = {j: u_BSD[b, i] @ w_s_DD @ u_BSD[b, j] / options.temperature for j in allowed}
        return normalised({j: torch.exp(s) for j, s in score.items()})

    return row


def attention_row(state: AttentionState, h: int, b: int, i: int, masked: bool) -> dict[int, Tensor]:
    """A_hij ∝ exp(scaling · q_i · k_j)."""
    g = h // (H // G)
    score = {j: state.scaling * state.query_BHSC[b, h, i] @ state.key_BGLC[b, g, j] for j in may_see(b, i, masked)}
    return normalised({j: torch.exp(s) for j, s in score.items()})


def mean_entropies(state: AttentionState, masked: bool) -> list[float]:
    """Of each head's attention, over real tokens."""
    real = [(b, i) for b in range(B) for i in range(S) if not masked or MASK_BS[b, i]]
    return [
        sum(entropy(list(attention_row(state, h, b, i, masked).values())).item() for b, i in real) / len(real)
        for h in range(H)
    ]


def posterior(made: Router, state: AttentionState, head: int, masked: bool) -> Mixing:
    """A'_ij ∝ A_ij N(u_i | v_j, σ² I)."""
    variance = made.options.sigma**2

    def row(b: int, i: int) -> dict[int, Tensor]:
        weight = attention_row(state, head, b, i, masked)
        if not made.options.posterior:
            return weight
        for j in weight:
            distance = ((state.out_BSHC[b, i, head] - state.value_BGLC[b, head // (H // G), j]) ** 2).sum()
            density = torch.exp(-distance / (2 * variance)) / (2 * math.pi * variance) ** (C / 2)
            weight[j] = weight[j] * density
        return normalised(weight)

    return row


def mixtures(made: Router, u_TD: Tensor, mixing: Mixing) -> list[Tensor]:
    """r_i = Σ_j A_ij p_j, token by token."""
    p, options, rows = distributions(made, u_TD), made.options, []
    for b in range(B):
        for i in range(S):
            r_E = torch.zeros(E, dtype=torch.float64)
            for j, weight in mixing(b, i).items():
                share_E = p[b][j].detach() if options.stop_neighbours and j != i else p[b][j]
                r_E = r_E + (weight.detach() if options.stop_gradient else weight) * share_E
            rows.append(r_E)
    return rows


def assert_routing(
    made: Router, routing: Routing, r_TE: list[Tensor], u_TD: Tensor, k: int, masked: bool, inputs: list[Tensor]
) -> None:
    """Choice, weights, losses and their gradients, for all tokens that are not padding."""
    real = [t for t in range(T) if not masked or MASK_BS.reshape(-1)[t]]
    renormalise = made.options.renormalise if made.options.renormalise is not None else k > 1
    got_TK, weight_TK, want = routing.expert_N.view(T, k), routing.weight_N.view(T, k), []
    load = [0] * E
    for t in real:
        chosen = reference.best(r_TE[t], k)
        assert got_TK[t].tolist() == chosen
        total = sum(r_TE[t][e] for e in chosen) if renormalise else 1.0
        want.append(torch.stack([r_TE[t][e] / total for e in chosen]))
        for e in chosen:
            load[e] += 1
        torch.testing.assert_close(routing.prob_TE[t], r_TE[t].detach())
    want_TK = torch.stack(want)
    torch.testing.assert_close(weight_TK[real], want_TK)
    direction_TK = torch.randn_like(want_TK)
    assert_same_gradients((weight_TK[real] * direction_TK).sum(), (want_TK * direction_TK).sum(), inputs)
    assert routing.load_E.tolist() == load

    if not made.training:
        assert not routing.losses
        return
    logits_TE = torch.stack([made.scores.weight @ u_TD[t] for t in real])
    losses = {
        "balance_loss": E * sum(load[e] / sum(load) * sum(r_TE[t][e] for t in real) / len(real) for e in range(E)),
        "z_loss": reference.z_loss(logits_TE),
    }
    losses = {name: getattr(made.options, name) * loss for name, loss in losses.items()}
    losses = {name: loss for name, loss in losses.items() if loss != 0}
    torch.testing.assert_close(routing.losses, losses)
    if losses:
        assert_same_gradients(sum(routing.losses.values()), sum(losses.values()), inputs)


SIMILARITY: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"chunk": None},
    "chunks": {"chunk": 4, "z_loss": 0.3},
    "low_rank": {"rank": 2},
    "sharp": {"temperature": 0.05},
    "window": {"window": 3},
    "window_1": {"window": 1},
    "window_in_chunks": {"window": 2, "chunk": 1},
    "entropy_bound": {"entropy_bound": True},
    "bounded_window": {"entropy_bound": True, "window": 3, "chunk": 2, "rank": 3},
    "stop_gradient": {"stop_gradient": True},
    "stop_neighbours": {"stop_neighbours": True},
    "stop_neighbours_in_chunks": {"stop_neighbours": True, "chunk": 4, "window": 3},
    "stop_both": {"stop_gradient": True, "stop_neighbours": True, "chunk": 2},
    "as_it_is": {"renormalise": False},
    "no_losses": {"balance_loss": 0.0},
}


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("options", SIMILARITY.values(), ids=SIMILARITY)
def test_similarity_aware_equals_the_equations(options: dict[str, Any], k: int, train: bool, masked: bool) -> None:
    made, u_TD = similarity_router(k, train, **{"balance_loss": 0.7, **options}), hidden()
    routing = made(u_TD, context(masked))
    r_TE = mixtures(made, u_TD, similarity(made, u_TD, masked))
    inputs = [u_TD, made.scores.weight]
    if not made.options.stop_gradient:
        inputs += [parameter for name, parameter in made.named_parameters() if "RD" in name]
    assert_routing(made, routing, r_TE, u_TD, k, masked, inputs if options.get("window") != 1 else inputs[:2])


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"chunk": None},
    "chunks": {"chunk": 4, "z_loss": 0.3},
    "narrow": {"sigma": 0.4, "chunk": 1},
    "wide": {"sigma": 30.0},
    "attention_alone": {"posterior": False},
    "running": {"head": "running"},
    "rarely_measured": {"head": "running", "measure_every": 5},
    "stop_gradient": {"stop_gradient": True, "chunk": 4},
    "stop_neighbours": {"stop_neighbours": True, "posterior": False},
    "as_it_is": {"renormalise": False},
}


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention_aware_equals_the_equations(options: dict[str, Any], k: int, train: bool, masked: bool) -> None:
    made, u_TD = attention_router(k, train, **{"balance_loss": 0.7, **options}), hidden()
    for head in (1, 2):  # the sharpest, of one group and of the other
        state = attention_state()
        with torch.no_grad():
            state.query_BHSC[:, head] *= 6
        entropies = mean_entropies(state, masked)
        by_batch = train and made.options.head == "batch"
        if not by_batch:
            made.entropy_H.copy_(torch.randperm(H) + 1.0)
        used = min(range(H), key=(entropies if by_batch else made.entropy_H.tolist()).__getitem__)
        routing = made(u_TD, context(masked, attention=state, step=10))
        r_TE = mixtures(made, u_TD, posterior(made, state, used, masked))
        inputs = [u_TD, made.scores.weight]
        if not made.options.stop_gradient:
            inputs += list(state[: 4 if made.options.posterior else 2])
        assert_routing(made, routing, r_TE, u_TD, k, masked, inputs)

        if not train:
            assert routing.feedback is None
            continue
        tokens = int(MASK_BS.sum()) if masked else T
        assert routing.feedback is not None
        torch.testing.assert_close((routing.feedback[:-1] / tokens).tolist(), entropies)
        assert routing.feedback[-1] == tokens
        chosen_by = entropies if by_batch else made.entropy_H.tolist()
        assert routing.stats["head_entropy"].item() == pytest.approx(chosen_by[used], rel=1e-6)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("make", [similarity_router, attention_router])
def test_router_learns_from_the_task(make: Callable[..., Router], k: int) -> None:
    made = make(k, balance_loss=0.0)
    routing = made(hidden(), context(False, attention=attention_state()))
    gradients = torch.autograd.grad((routing.weight_N * torch.randn(T * k)).sum(), list(made.parameters()))
    assert min(gradient.norm() for gradient in gradients) > 1e-4


@pytest.mark.parametrize("make", [similarity_router, attention_router])
def test_weights_that_would_be_constantly_one_are_refused(make: Callable[..., Router]) -> None:
    with pytest.raises(ValueError, match="set renormalise to null or false"):
        make(1, renormalise=True)
    make(2, renormalise=True)
    assert not make(1).renormalise


@pytest.mark.parametrize("make", [similarity_router, attention_router])
def test_a_slimmed_evaluation_keeps_the_trained_rule_of_weights(make: Callable[..., Router]) -> None:
    u_TD, state = hidden(), attention_state()
    for trained, evaluated in ((2, 1), (2, 3), (1, 2)):
        routing = make(trained, train=False)(u_TD, context(False, attention=state, experts_per_token=evaluated))
        total_T = routing.weight_N.view(T, evaluated).sum(-1)
        assert routing.choices == evaluated
        assert bool((total_T - 1).abs().max() < 1e-9) == (trained == 2)


def test_similarity_starts_as_a_cosine() -> None:
    """W_s begins as the identity over its rank: an RMS-normalised input meets itself with similarity about 1."""
    cls = ROUTERS["similarity_aware"]
    unit_TD = torch.nn.functional.rms_norm(torch.randn(50, 512), (512,))
    for rank in (None, 256):
        made = cls(512, E, 2, cls.Options(rank=rank))
        key_TR = unit_TD if made.key_RD is None else unit_TD @ made.key_RD.T
        similarity_TT = (unit_TD @ made.query_RD.T) @ key_TR.T / made.rank
        assert (similarity_TT.diagonal() - 1).abs().max() < 0.3
        assert (similarity_TT - similarity_TT.diagonal().diag()).abs().max() < 0.4


def test_low_temperature_and_the_entropy_bound_never_make_a_token_less_certain() -> None:
    """τ → 0 takes the distribution of the most similar token, of those that are no less certain."""
    made, u_TD = similarity_router(temperature=1e-6, entropy_bound=True, train=False), hidden()
    r_TE = made(u_TD, context(False)).prob_TE
    p = [row for rows in distributions(made, u_TD) for row in rows]
    moved = 0
    for r_E, p_E in zip(r_TE, p, strict=True):
        assert entropy(r_E) <= entropy(p_E) + 1e-9
        assert min((r_E - other_E).abs().max() for other_E in p) < 1e-9
        moved += bool((r_E - p_E).abs().max() > 1e-3)
    assert moved > 0


def test_equal_entropies_are_equal_despite_rounding() -> None:
    """A token repeated: its own distribution and the earlier one's differ by rounding, and both are mixed in."""
    made = similarity_router(entropy_bound=True, train=False).float()
    u_TD = torch.randn(1, D) + 1e-7 * torch.randn(T, D)
    edges = []
    plain = torch.Tensor.masked_fill

    def masked_fill(value: Tensor, mask: Tensor, fill: float) -> Tensor:
        edges.append(~mask)
        return plain(value, mask, fill)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "masked_fill", masked_fill)
        made(u_TD, context(False))
    (edge_BSL,) = edges
    assert torch.equal(edge_BSL, torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S))


@pytest.mark.parametrize("make", [similarity_router, attention_router])
def test_no_matrix_over_all_pairs_of_positions_is_kept(make: Callable[..., Router]) -> None:
    """With chunks, what the backward pass keeps is linear in the sequence; without, it is not."""
    long = 96
    u_TD = torch.randn(long, D, dtype=torch.float64, requires_grad=True)
    shapes = ((1, H, long, C), (1, G, long, C), (1, G, long, C), (1, long, H, C))
    state = AttentionState(*(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes), 1.0)
    largest = {}
    for chunk in (None, 8):
        kept = []

        def keep(value: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            make(chunk=chunk)(u_TD, RoutingContext(attention=state)).weight_N.sum().backward()
        largest[chunk] = max(kept)
    assert largest[None] >= long * long
    assert largest[8] < long * 24


@pytest.mark.parametrize("make", [similarity_router, attention_router])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_padding_and_other_sequences_are_not_felt(make: Callable[..., Router], train: bool) -> None:
    options = {"head": "running"} if make is attention_router else {}
    made, u_TD, state = make(train=train, **options), hidden(), attention_state()
    real_T = MASK_BS.reshape(-1)
    plain = made(u_TD, context(True, attention=state))
    noise_TD = torch.randn(T, D) * ~real_T[:, None] * 5
    noise_BS = ~MASK_BS * torch.randn(B, S) * 5
    changed_state = state._replace(
        key_BGLC=state.key_BGLC + noise_BS[:, None, :, None], value_BGLC=state.value_BGLC + noise_BS[:, None, :, None]
    )
    changed = made(u_TD + noise_TD, context(True, attention=changed_state))
    torch.testing.assert_close(changed.prob_TE[real_T], plain.prob_TE[real_T])
    torch.testing.assert_close(changed.losses, plain.losses)

    first = u_TD.detach().clone()
    first[:S] += torch.randn(S, D)
    other = made(first, context(True, attention=state))
    torch.testing.assert_close(other.prob_TE[S:], plain.prob_TE[S:])
    assert not torch.allclose(other.prob_TE[:S], plain.prob_TE[:S])


def test_running_mean_of_the_entropies() -> None:
    """The first measurement as it is, then m · old + (1 − m) · new, each a mean over all tokens of the step."""
    made = attention_router(momentum=0.75)
    made.entropy_H.zero_()
    with torch.no_grad():
        parts = [made(hidden(), context(masked, attention=attention_state())).feedback for masked in (False, True)]
    assert made.entropy_H.abs().max() == 0  # a forward pass changes nothing
    first_H = (parts[0][:-1] + parts[1][:-1]) / (T + MASK_BS.sum())
    made.after_step(parts[0] + parts[1])
    torch.testing.assert_close(made.entropy_H, first_H)
    made.after_step(parts[1])
    torch.testing.assert_close(made.entropy_H, 0.75 * first_H + 0.25 * parts[1][:-1] / MASK_BS.sum())


def test_heads_are_measured_only_as_often_as_asked() -> None:
    made = attention_router(head="running", measure_every=3)
    found = [made(hidden(), context(False, attention=attention_state(), step=step)) for step in range(6)]
    assert [routing.feedback is not None for routing in found] == [True, False, False] * 2
    assert len({tuple(routing.stats) for routing in found}) == 1


def test_s2moe_measures_the_attention_once_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = attention_aware.head_entropies

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(attention_aware, "head_entropies", counted)
    config = resolve_moe(
        {"num_experts": E, "expert_hidden": 3, "router": {"name": "attention_aware", "num_attention_heads": H}}
    )
    layer = build_layer(config, D, 0).double()
    given, state = RoutingContext(attention=attention_state()), attention_state()
    for attention in (given.attention, state):  # a context used again does not bring the last pass's figures along
        calls.clear()
        _, statistics = layer(hidden().view(B, S, D), replace(given, attention=attention))
        assert len(calls) == 1
        want_H = torch.tensor(mean_entropies(attention, False), dtype=torch.float64)
        torch.testing.assert_close(statistics.feedback[:-1] / statistics.feedback[-1], want_H)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (similarity_router, {"temperature": 0.0}, "temperature must be positive"),
        (similarity_router, {"rank": 0}, "rank must be at least 1"),
        (similarity_router, {"rank": D + 1}, "rank must not exceed the model's width 5"),
        (similarity_router, {"window": 0}, "window must be at least 1"),
        (similarity_router, {"chunk": 0}, "chunk must be at least 1"),
        (attention_router, {"sigma": 0.0}, "sigma must be positive"),
        (attention_router, {"chunk": -1}, "chunk must be at least 1"),
        (attention_router, {"measure_every": 0}, "measure_every must be at least 1"),
        (attention_router, {"measure_every": 2}, "set head=running, or measure_every=1"),
        (attention_router, {"momentum": 1.0}, "momentum must lie in"),
        (attention_router, {"num_attention_heads": None}, "router.num_attention_heads"),
    ],
)
def test_bad_options_are_refused(make: Callable[..., Router], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_attention_aware_says_what_it_misses() -> None:
    with pytest.raises(ValueError, match=r"needs context\.attention"):
        attention_router()(hidden(), context(False))
    cls = ROUTERS["attention_aware"]
    with pytest.raises(ValueError, match="has 4 query heads"):
        cls(D, E, 2, cls.Options(num_attention_heads=H + 1))(hidden(), context(False, attention=attention_state()))


@pytest.mark.parametrize("make", [similarity_router, attention_router])
def test_no_tokens_at_all(make: Callable[..., Router]) -> None:
    """A rank may be left without any."""
    state = AttentionState(*(value[:1, :, :0] for value in attention_state()[:3]), torch.zeros(1, 0, H, C), 1.0)
    routing = make(train=False)(torch.zeros(0, D, dtype=torch.float64), RoutingContext(attention=state))
    assert len(routing.token_N) == routing.counts_E.sum() == 0
