"""Switch, GShard, Shazeer's noisy top-k, auxiliary-loss-free balancing and DeepSeek-V3 as methods by name.

Each is written out from its paper's equations, one token at a time, and compared with the layer that
``model.moe.method`` makes, with all its defaults: output, auxiliary losses and every gradient.

Legend: B batch, S sequence, T = B S tokens, D model, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routing import RoutingContext
from tests.models.decoder import tiny
from tests.moe import reference
from tests.moe.reference import Choice
from tests.moe.test_layer import B, D, E, S, assert_same_gradients, experts, hidden, layer, shared

T = B * S
CONTEXT = RoutingContext(seed=3, step=5, microbatch=2, layer=1)
Mask = list[bool]


@dataclass
class Answer:
    """A method's choices for each token and its weighted losses."""

    choices: list[list[Choice]]
    losses: dict[str, Tensor]


def draw(purpose: str) -> torch.Generator:
    """What the layer draws from."""
    return CONTEXT.generator(torch.device("cpu"), purpose)


def fill(capacity: int, queue: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """The (token, expert) pairs that find a place, in the order of the queue."""
    used, kept = [0] * E, set()
    for t, e in queue:
        if used[e] < capacity:
            used[e] += 1
            kept.add((t, e))
    return kept


def switch(made: SMoELayer, x_TD: Tensor, train: bool, real: Mask) -> Answer:
    """p = softmax(W (x ⊙ jitter)); y = p_a E_a(x), a = argmax p; loss 0.01 · E Σ f_i P_i; capacity 1.25 T/E."""
    weight_ED = made.router.scores.weight
    factor_TD = torch.empty(T, D, dtype=torch.float64).uniform_(0.99, 1.01, generator=draw("router noise"))
    probs = [reference.normalise_exp(weight_ED @ (x * f if train else x)) for x, f in zip(x_TD, factor_TD, strict=True)]
    chosen = [int(p.argmax()) for p in probs]
    tokens = [t for t in range(T) if real[t]]
    if not train:
        return Answer([[(chosen[t], probs[t][chosen[t]])] for t in range(T)], {})
    kept = fill(math.ceil(1.25 * len(tokens) / E), [(t, chosen[t]) for t in tokens])
    loss = torch.zeros(())
    for i in range(E):
        f = sum(chosen[t] == i for t in tokens) / len(tokens)
        loss = loss + 0.01 * E * f * sum(probs[t][i] for t in tokens) / len(tokens)
    choices = [[(chosen[t], probs[t][chosen[t]])] if (t, chosen[t]) in kept else [] for t in range(T)]
    return Answer(choices, {"balance_loss": loss})


def gshard(made: SMoELayer, x_TD: Tensor, train: bool, real: Mask) -> Answer:
    """Algorithm 1: g1, g2 over their sum; the second where 2 g2 > u, u uniform; capacity 2 T/E; loss by first choices.

    The loss is mean_i (m_i c_i) times E², m_i the mean gate, c_i the share of first choices.
    """
    gates = [reference.normalise_exp(made.router.scores.weight @ x) for x in x_TD]
    uniform_T = torch.rand(T, generator=draw("second choice"), dtype=torch.float64)
    pairs = [reference.best(g, 2) for g in gates]
    tokens = [t for t in range(T) if real[t]]

    def weight(t: int, e: int) -> Tensor:
        return gates[t][e] / (gates[t][pairs[t][0]] + gates[t][pairs[t][1]])

    if not train:
        return Answer([[(e, weight(t, e)) for e in pairs[t]] for t in range(T)], {})
    seconds = [t for t in tokens if 2 * weight(t, pairs[t][1]) > uniform_T[t]]
    queue = [(t, pairs[t][0]) for t in tokens] + [(t, pairs[t][1]) for t in seconds]
    kept = fill(math.ceil(2 * len(tokens) / E), queue)
    products = []
    for i in range(E):
        mean_gate = sum(gates[t][i] for t in tokens) / len(tokens)
        products.append(mean_gate * sum(pairs[t][0] == i for t in tokens) / len(tokens))
    loss = 0.01 * sum(products) / E * E**2
    return Answer([[(e, weight(t, e)) for e in pairs[t] if (t, e) in kept] for t in range(T)], {"balance_loss": loss})


def noisy_topk(made: SMoELayer, x_TD: Tensor, train: bool, real: Mask) -> Answer:
    """H = W_g x + normal · (softplus(W_n x) + 0.01); softmax over the 2 kept; 0.1 CV²(importance) + 0.1 CV²(load)."""
    clean = [made.router.scores.weight @ x for x in x_TD]
    std = [torch.log(1 + torch.exp(made.router.noise_scores.weight @ x)) + 0.01 for x in x_TD]
    normal_TE = torch.randn(T, E, generator=draw("router noise"), dtype=torch.float64)
    noisy = [c + n * s if train else c for c, n, s in zip(clean, normal_TE, std, strict=True)]
    choices = []
    for logits_E in noisy:
        kept = reference.best(logits_E, 2)
        gates = reference.normalise_exp(torch.stack([logits_E[e] for e in kept]))
        choices.append(list(zip(kept, gates, strict=True)))
    if not train:
        return Answer(choices, {})
    tokens = [t for t in range(T) if real[t]]
    load = reference.smooth_load(*(torch.stack([rows[t] for t in tokens]) for rows in (clean, noisy, std)), 2)
    importance = reference.importance([choices[t] for t in tokens], E)
    return Answer(choices, {"importance_loss": 0.1 * importance, "load_loss": 0.1 * load})


def biased(made: SMoELayer, x_D: Tensor) -> tuple[Tensor, list[int]]:
    """s = sigmoid(W x), and the top 2 of s + b."""
    s_E = 1 / (1 + torch.exp(-(made.router.scores.weight @ x_D)))
    return s_E, reference.best(s_E + made.router.bias_E, 2)


def loss_free(made: SMoELayer, x_TD: Tensor, train: bool, real: Mask) -> Answer:
    """Wang et al., section 3: g_i = s_i where s_i + b_i is among the top 2, else 0; no loss."""
    scored = [biased(made, x_D) for x_D in x_TD]
    return Answer([[(e, s_E[e]) for e in chosen] for s_E, chosen in scored], {})


def deepseek_v3(made: SMoELayer, x_TD: Tensor, train: bool, real: Mask) -> Answer:
    """Eqs. 12 to 20: g_i = 2.5 s_i / Σ of the chosen s, without b; 1e-4 · mean over sequences of Σ_i f_i P_i.

    f_i = E / (K S) Σ_t 1(s_ti among the top K of s_t), P_i = 1/S Σ_t s_ti / Σ_j s_tj, over the sequence's tokens.
    """
    scored = [biased(made, x_D) for x_D in x_TD]
    choices = [[(e, 2.5 * s_E[e] / sum(s_E[i] for i in chosen)) for e in chosen] for s_E, chosen in scored]
    if not train:
        return Answer(choices, {})
    total, sequences = torch.zeros(()), 0
    for b in range(B):
        tokens = [t for t in range(b * S, (b + 1) * S) if real[t]]
        if not tokens:
            continue
        sequences += 1
        scores = {t: 1 / (1 + torch.exp(-(made.router.scores.weight @ x_TD[t]))) for t in tokens}
        for i in range(E):
            f = E / (2 * len(tokens)) * sum(i in reference.best(scores[t], 2) for t in tokens)
            total = total + f * sum(scores[t][i] / scores[t].sum() for t in tokens) / len(tokens)
    return Answer(choices, {"sequence_loss": 1e-4 * total / sequences})


METHODS: dict[str, Callable[[SMoELayer, Tensor, bool, Mask], Answer]] = {
    "switch": switch,
    "gshard": gshard,
    "noisy_topk": noisy_topk,
    "loss_free": loss_free,
    "deepseek_v3": deepseek_v3,
}
MASKS = {
    "full": [True] * T,
    "padded": [t % 4 != 1 for t in range(T)],
    "one sequence": [t >= S for t in range(T)],
}


def made_by(method: str, **moe: Any) -> SMoELayer:
    made = layer(method=method, **moe)
    with torch.no_grad():
        made.router.scores.weight[:, 0] = torch.tensor([0.0, 0.2, 1.0, -0.2])  # with `tokens` favours expert 2
    if hasattr(made.router, "bias_E"):
        made.router.bias_E.copy_(torch.tensor([0.3, -0.2, 0.1, -0.2]))
    return made


def tokens() -> Tensor:
    """Hidden states many of which want the same expert, so that capacity drops something."""
    hidden_BSD = hidden()
    with torch.no_grad():
        hidden_BSD[..., 0] = 2.0
    return hidden_BSD


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("method", METHODS)
def test_the_method_equals_its_papers_equations(method: str, train: bool, mask: str) -> None:
    made, hidden_BSD, real = made_by(method).train(train), tokens(), MASKS[mask]
    real_T = torch.tensor(real)
    context = CONTEXT if mask == "full" else RoutingContext(**{**CONTEXT.__dict__, "mask_T": real_T})
    out_BSD, statistics = made(hidden_BSD, context)

    x_TD = hidden_BSD.reshape(-1, D)
    want = METHODS[method](made, x_TD, train, real)
    y_TD = reference.mixture(x_TD, want.choices, experts(made), "gated", "silu") + shared(made, x_TD)
    got_TD = out_BSD.reshape(-1, D)
    torch.testing.assert_close(got_TD[real_T], y_TD[real_T])
    for name, value in want.losses.items():
        coefficient = getattr(made.router.options, name)
        torch.testing.assert_close(statistics.values[name] * coefficient, value.detach())
    if train and method in ("switch", "gshard"):
        assert statistics.values["dropped_fraction"] > 0
    loss = sum(want.losses.values(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(statistics.loss.double(), loss.detach())
    direction_TD = torch.randn(T, D, dtype=torch.float64) * real_T[:, None]
    got, wanted = (got_TD * direction_TD).sum() + statistics.loss, (y_TD * direction_TD).sum() + loss
    if method == "noisy_topk" and not train:  # without noise W_n has no part in anything
        made.router.noise_scores.weight.requires_grad_(False)
        parameters = [p for p in made.parameters() if p.requires_grad]
        for left, right in zip(
            torch.autograd.grad(got, [hidden_BSD, *parameters]),
            torch.autograd.grad(wanted, [hidden_BSD, *parameters]),
            strict=True,
        ):
            torch.testing.assert_close(left, right)
    else:
        assert_same_gradients(got, wanted, made, hidden_BSD)


# --- GShard's second expert ----------------------------------------------------------------------


def gshard_router(logits_E: list[float], **options: Any) -> torch.nn.Module:
    """A router whose logits are those whatever the token (which is 1)."""
    made = ROUTERS["topk"](1, E, 2, ROUTERS["topk"].Options(second_choice="random", renormalise=True, **options))
    with torch.no_grad():
        made.scores.weight.copy_(torch.tensor(logits_E)[:, None])
    return made


@pytest.mark.parametrize("second", [0.05, 0.2, 0.5])
def test_the_second_expert_is_kept_as_often_as_its_weight_says(second: float) -> None:
    tokens = 20_000
    made = gshard_router([math.log(1 - second), math.log(second), -30.0, -30.0])
    routing = made(torch.ones(tokens, 1), RoutingContext())
    kept = routing.counts_E[1].item() / tokens
    assert kept == pytest.approx(2 * second, abs=4 * (0.25 / tokens) ** 0.5)
    assert routing.counts_E[0].item() == tokens
    assert routing.stats["second_kept"].item() == pytest.approx(kept)
    assert routing.stats["dropped_fraction"].item() == pytest.approx(0.0, abs=1e-6)
    assert routing.load_E.tolist() == routing.counts_E.tolist()
    weight_N = routing.weight_N.detach()
    torch.testing.assert_close(weight_N[routing.expert_N == 0], torch.full((tokens,), 1 - second))
    assert not made.eval()(torch.ones(9, 1), RoutingContext()).counts_E[:2].sub(9).any()


def test_the_draw_repeats_for_the_same_context_only() -> None:
    made, ones_TD = gshard_router([0.5, 0.0, -9.0, -9.0]), torch.ones(60, 1)
    first = made(ones_TD, CONTEXT).token_N.tolist()
    torch.manual_seed(99)
    assert made(ones_TD, CONTEXT).token_N.tolist() == first
    for key in ("seed", "step", "microbatch", "layer"):
        other = RoutingContext(**{**CONTEXT.__dict__, key: 9})
        assert made(ones_TD, other).token_N.tolist() != first
    assert made(ones_TD, CONTEXT.for_copy()).token_N.tolist() != first


def test_a_second_choice_given_up_takes_nobodys_place() -> None:
    """With room for two, seconds of the earlier tokens would fill expert 1, had they been drawn."""
    made = gshard_router([0.0, -2.0, -30.0, -30.0], capacity_factor=0.2)  # ceil(0.2 * 2 * 40 / 4) = 4 places
    routing = made(torch.ones(40, 1), RoutingContext())
    made.options.capacity_factor = None
    asked = made(torch.ones(40, 1), RoutingContext())
    seconds = asked.token_N[asked.expert_N == 1].tolist()
    assert seconds[:4] != list(range(4))
    assert routing.token_N[routing.expert_N == 1].tolist() == seconds[:4]
    assert routing.load_E.tolist() == asked.load_E.tolist()


@pytest.mark.parametrize("k", [1, 3])
def test_a_random_second_choice_needs_two_experts(k: int) -> None:
    with pytest.raises(ValueError, match="experts_per_token=2, or second_choice=always"):
        ROUTERS["topk"](D, E, k, ROUTERS["topk"].Options(second_choice="random"))


def test_gate_values_of_experts_given_up_count_for_nothing() -> None:
    """CV² of importance sums what a token's experts really weigh."""
    made = gshard_router([0.0, -2.0, -30.0, -30.0], importance_loss=1.0, balance_loss=0.0)
    routing = made(torch.ones(40, 1), RoutingContext())
    total_E = torch.zeros(E).index_add(0, routing.expert_N, routing.weight_N.detach())
    torch.testing.assert_close(routing.losses["importance_loss"].detach(), reference.cv_squared(list(total_E)))


def test_s2moe_may_use_gshards_gate() -> None:
    model = tiny("s2moe_k2", {"second_choice": "random", "renormalise": True, "capacity_factor": 1.0})
    ids = torch.randint(19, (2, 8))
    out = model(ids, labels=ids)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert {"second_kept", "dropped_fraction"} <= out.routing[0].values.keys()


# --- initial values and state --------------------------------------------------------------------


def model_of(method: str) -> S2MoEForCausalLM:
    moe = {"method": method, "num_experts": E, "expert_hidden": 8}
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return S2MoEForCausalLM(S2MoEConfig(**sizes, moe=moe))


def test_shazeers_matrices_start_at_zero() -> None:
    """Appendix A: no signal and some noise, so about the same load for every expert."""
    model = model_of("noisy_topk")
    for block in model.model.layers:
        assert not block.moe.router.scores.weight.any()
        assert not block.moe.router.noise_scores.weight.any()
    load_E = model.train()(torch.randint(11, (8, 64))).routing[0].counts_E.float()
    assert load_E.std() / load_E.mean() < 0.3
    out = model(torch.randint(11, (2, 8)), labels=torch.randint(11, (2, 8)))
    out.loss.backward()
    assert model.model.layers[0].moe.router.scores.weight.grad.any()  # and it leaves zero
    assert model_of("smoe").model.layers[0].moe.router.scores.weight.any()


@pytest.mark.parametrize("method", ["loss_free", "deepseek_v3"])
def test_the_bias_moves_once_a_step_by_the_load_of_all_micro_batches(method: str) -> None:
    model = model_of(method).train()
    micro = [model(torch.randint(11, (2, 6)), context=RoutingContext(microbatch=i)).routing for i in range(2)]
    model.update_routers(micro)
    model.eval()(torch.randint(11, (2, 6)))
    for index, block in enumerate(model.model.layers):
        load_E = (micro[0][index].counts_E + micro[1][index].counts_E).tolist()
        mean = sum(load_E) / E
        step = [1e-3 * ((mean > n) - (mean < n)) for n in load_E]
        centred = torch.tensor([s - sum(step) / E for s in step])
        torch.testing.assert_close(block.moe.router.bias_E, centred)
        assert any(step)
    assert all(name in model.state_dict() for name, _ in model.named_buffers() if "bias_E" in name)


def test_methods_keep_their_settings_apart() -> None:
    """One method's defaults are not changed by what another run sets."""
    changed = resolve_moe({"method": "loss_free", "router": {"scale": 7.0, "bias_update_rate": 0.5}})
    assert changed.router["scale"] == 7.0
    assert resolve_moe({"method": "loss_free"}).router["scale"] == 1.0
    assert resolve_moe({"method": "deepseek_v3"}).router["bias_update_rate"] == 1e-3
