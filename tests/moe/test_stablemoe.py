"""StableMoE: both stages, the distilled router in its three forms, and the change from one to the other.

Legend: B sequences, S tokens of each, T = B S, D model, E experts, C width of the distilled router, V vocabulary,
K choices, N assignments.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.models.sizes import model_sizes
from s2moe.moe.config import resolve_moe
from s2moe.moe.history import recent
from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.training.weights import find_weights, load_weights
from tests.distributed import test_expert_parallel as layouts
from tests.distributed_harness import run_distributed
from tests.methods import test_conformance as conformance
from tests.models.decoder import ROTARY, tiny
from tests.moe import reference
from tests.run_logs import reproducible_events
from tests.training.jobs import tiny_run

B, S, D, E, V, C = 2, 6, 7, 5, 11, 3
T = B * S
FORMS = ("word", "bigram", "cnn")
STEPS, BOUNDARY = 40, 4  # stage1_fraction is 0.1
TRAIN = "tests.training.jobs:train"


def router(k: int = 1, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["stablemoe"]
    made = cls(D, E, k, cls.Options(**{"vocab_size": V, "distilled_width": C, **options})).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made.train(train)


def context(step: int, mask_T: Tensor | None = None, **given: Any) -> RoutingContext:
    token_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(step))
    mask_BS = None if mask_T is None else mask_T.view(B, S).long()
    values = {"token_T": token_T, "sequences": B, "steps": STEPS, "mask_T": mask_T, "attention_mask": mask_BS}
    return RoutingContext(step=step, **{**values, **given})


def hidden() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, requires_grad=True)


# --- the equations -------------------------------------------------------------------------------


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def features(made: Router, ids: list[int], real: list[bool]) -> list[Tensor]:
    """D(x_t) for each token of one sequence; what is not real does not exist for those that are."""
    form, rows_VC, out = made.options.distilled, made.table_VC, []
    for t, token in enumerate(ids):
        if form == "word":
            out.append(rows_VC[token])
        elif form == "bigram":
            exists = t > 0 and real[t - 1]
            out.append((rows_VC[token] + rows_VC[ids[t - 1] if exists else token]) / 2)
        else:
            total = made.kernel_W[0] * rows_VC[token]
            for back in range(1, 5):
                if t - back >= 0 and real[t - back]:
                    total = total + made.kernel_W[back] * rows_VC[ids[t - back]]
            out.append(total)
    return out


@dataclass
class Wanted:
    pairs: list[tuple[int, int, Tensor]]  # token, expert, weight
    balance: Tensor
    distill: Tensor


def wanted(made: Router, hidden_TD: Tensor, given: RoutingContext, k: int, by_distilled: bool) -> Wanted:
    """A stage's routing and both losses (over real tokens), one token and one expert at a time."""
    real = [True] * T if given.mask_T is None else given.mask_T.tolist()
    ids = given.token_T.tolist()
    d = [f for b in range(B) for f in features(made, ids[b * S : (b + 1) * S], real[b * S : (b + 1) * S])]
    s = [torch.stack([made.centroid_ED[i] @ h for i in range(E)]) for h in hidden_TD]
    s_hat = [torch.stack([made.distilled_centroid_EC[i] @ d[t] for i in range(E)]) for t in range(T)]
    learned = [reference.best(s[t], k) for t in range(T)]
    chosen = [reference.best(s_hat[t], k) for t in range(T)] if by_distilled else learned
    pairs = [(t, a, sigmoid(s[t][a])) for t in range(T) for a in chosen[t]]

    tokens = sum(real)
    balance = torch.zeros((), dtype=torch.float64)
    n = k * tokens / E
    for i in range(E):
        members = [t for t in range(T) if real[t] and i in chosen[t]]
        for t in members:
            balance = balance + (len(members) - n) / n * sigmoid(s[t][i]) / tokens
    distill = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        if real[t]:
            for a in learned[t]:
                distill = distill - torch.log(reference.normalise_exp(s_hat[t])[a]) / (k * tokens)
    return Wanted(pairs, balance, distill)


def assert_routes(routing: Routing, want: Wanted) -> None:
    assert routing.token_N.tolist() == [t for t, _, _ in want.pairs]
    assert routing.expert_N.tolist() == [a for _, a, _ in want.pairs]
    torch.testing.assert_close(routing.weight_N, torch.stack([w for _, _, w in want.pairs]))


def total_of(routing: Routing, direction_N: Tensor) -> Tensor:
    return (routing.weight_N * direction_N).sum() + sum(routing.losses.values())


def gradients(value: Tensor, hidden_TD: Tensor, made: Router) -> dict[str, Tensor]:
    named = {"hidden": hidden_TD, **dict(made.named_parameters())}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(named.items(), found, strict=True)}


MASK_T = torch.arange(T) % 5 != 1


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("form", FORMS)
def test_stage_1_equals_the_equations(form: str, k: int, masked: bool) -> None:
    made, hidden_TD = router(k, distilled=form, balance_loss=0.3, distill_loss=0.8), hidden()
    given = context(BOUNDARY - 1, MASK_T if masked else None)
    routing = made(hidden_TD, given)
    want = wanted(made, hidden_TD, given, k, by_distilled=False)
    assert_routes(routing, want)
    torch.testing.assert_close(routing.losses["balance_loss"], 0.3 * want.balance)
    torch.testing.assert_close(routing.losses["distill_loss"], 0.8 * want.distill)
    torch.testing.assert_close(routing.stats["balance_loss"], want.balance.detach())
    torch.testing.assert_close(routing.stats["distill_loss"], want.distill.detach())
    assert routing.stats["stage"] == 1
    if k < E:
        assert want.balance.abs() > 1e-3

    direction_N = torch.randn(T * k, dtype=torch.float64)
    weights = torch.stack([w for _, _, w in want.pairs])
    value = (weights * direction_N).sum() + 0.3 * want.balance + 0.8 * want.distill
    got, right = (gradients(v, hidden_TD, made) for v in (total_of(routing, direction_N), value))
    for name, gradient in right.items():
        assert gradient.norm() > 1e-4, name
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    # The distillation teaches the distilled router alone: its targets are given.
    alone = gradients(made(hidden_TD, given).losses["distill_loss"], hidden_TD, made)
    assert alone["hidden"].abs().max() == alone["centroid_ED"].abs().max() == 0


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("form", FORMS)
def test_stage_2_equals_the_equations(form: str, k: int, masked: bool) -> None:
    made, hidden_TD = router(k, distilled=form), hidden()
    given = context(BOUNDARY, MASK_T if masked else None)
    routing = made(hidden_TD, given)
    want = wanted(made, hidden_TD, given, k, by_distilled=True)
    assert_routes(routing, want)
    assert routing.losses.keys() == {"balance_loss", "distill_loss"}
    assert all(loss == 0 for loss in routing.losses.values())
    torch.testing.assert_close(routing.stats["balance_loss"], want.balance.detach())
    assert routing.stats["stage"] == 2

    direction_N = torch.randn(T * k, dtype=torch.float64)
    weights = torch.stack([w for _, _, w in want.pairs])
    got = gradients(total_of(routing, direction_N), hidden_TD, made)
    right = gradients((weights * direction_N).sum(), hidden_TD, made)
    for name in ("hidden", "centroid_ED"):
        assert right[name].norm() > 1e-3
        torch.testing.assert_close(got[name], right[name])
    total_of(made(hidden_TD, given), direction_N).backward()
    for name in made.distilled_names:  # there, and zero
        assert getattr(made, name).grad is not None, name
        assert getattr(made, name).grad.abs().max() == 0, name


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("form", FORMS)
def test_evaluation_routes_by_token_ids_in_both_stages(form: str, k: int) -> None:
    made, hidden_TD = router(k, distilled=form), hidden()
    given = context(BOUNDARY)
    for step in (BOUNDARY - 1, BOUNDARY):
        made.train()(hidden_TD, context(step))
        routing = made.eval()(hidden_TD, RoutingContext(token_T=given.token_T, sequences=B))  # no step is needed
        want = wanted(made, hidden_TD, given, k, by_distilled=True)
        assert_routes(routing, want)
        assert routing.losses == {}
        weights = torch.stack([w for _, _, w in want.pairs])
        direction_N = torch.randn(T * k, dtype=torch.float64)
        got, right = (gradients((w * direction_N).sum(), hidden_TD, made) for w in (routing.weight_N, weights))
        for name, gradient in right.items():
            torch.testing.assert_close(got[name], gradient)
        slim = made(hidden_TD, RoutingContext(token_T=given.token_T, sequences=B, experts_per_token=1))
        assert_routes(slim, wanted(made, hidden_TD, given, 1, by_distilled=True))


def test_balance_by_hand() -> None:
    """Four tokens, two experts: three to the first (excess +1/2), one to the second (−1/2)."""
    cls = ROUTERS["stablemoe"]
    made = cls(2, 2, 1, cls.Options(vocab_size=3, balance_loss=1.0)).double()
    made.centroid_ED.data = torch.eye(2, dtype=torch.float64)
    hidden_TD = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    routing = made(hidden_TD, RoutingContext(steps=STEPS, token_T=torch.zeros(4, dtype=torch.int64)))
    assert routing.expert_N.tolist() == [0, 0, 0, 1]
    s1, s2, s3 = (torch.tensor(float(value)).double().sigmoid() for value in (1, 2, 3))
    torch.testing.assert_close(routing.losses["balance_loss"], ((s1 + s2 + s3) / 2 - s1 / 2) / 4)
    torch.testing.assert_close(routing.weight_N, torch.stack((s1, s2, s3, s1)))


# --- the change of stage -------------------------------------------------------------------------


def test_stage_2_begins_after_a_tenth_of_the_run() -> None:
    for options, steps, first in (
        ({}, 60_000, 6_000),
        ({"stage1_fraction": 0.5}, 7, 4),  # 3.5, to the even number
        ({"stage1_fraction": 0.3, "schedule_steps": 10}, 1_000_000, 3),
        ({"stage1_fraction": 0.0}, 10, 0),
    ):
        for step in {max(first - 1, 0), first, first + 1}:
            made = router(**options)
            routing = made(hidden(), context(step, token_T=torch.zeros(T, dtype=torch.int64), steps=steps))
            assert routing.stats["stage"] == (1 if step < first else 2), (options, step)
    always = router(stage1_fraction=1.0)
    assert always(hidden(), context(STEPS - 1)).stats["stage"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_momentum_and_weight_decay_do_not_move_the_frozen_router(form: str) -> None:
    """A zero gradient alone would not freeze it: Adam goes on for a while, and decay for ever."""
    made = router(distilled=form)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    probe_TD, given = hidden(), context(99)
    at_the_boundary: dict[str, Tensor] = {}
    routes = []
    for step in range(BOUNDARY + 6):
        if step == BOUNDARY:
            at_the_boundary = {name: getattr(made, name).detach().clone() for name in made.distilled_names}
        if step >= BOUNDARY:
            routes.append(made.eval()(probe_TD, given).expert_N)
            made.train()
        optimizer.zero_grad()
        routing = made(hidden(), context(step))
        total_of(routing, torch.randn(T, dtype=torch.float64)).backward()
        optimizer.step()
    assert all(torch.equal(route, routes[0]) for route in routes)
    for name, value in at_the_boundary.items():
        assert torch.equal(made.get_buffer(f"frozen_{name}"), value)
        assert (getattr(made, name) - value).abs().max() > 0.05, name  # which moved, without effect


def test_a_step_of_several_micro_batches_freezes_once() -> None:
    """Also where the second forward pass comes before the first backward pass."""
    made, hidden_TD = router(distilled="cnn"), hidden()
    first = made(hidden_TD, context(BOUNDARY))
    copies = {name: buffer.clone() for name, buffer in made.named_buffers()}
    second = made(hidden_TD, context(BOUNDARY))
    (total_of(first, torch.ones(T)) + total_of(second, torch.ones(T))).backward()
    assert copies["in_stage2"].item() is True
    assert all(torch.equal(buffer, copies[name]) for name, buffer in made.named_buffers())
    assert torch.equal(first.expert_N, second.expert_N)


def test_a_step_that_was_never_at_the_boundary_freezes_too_and_none_thaws() -> None:
    """A run shortened while it is interrupted passes the boundary unseen; one lengthened would come back before it."""
    made = router()
    assert made(hidden(), context(BOUNDARY + 3)).stats["stage"] == 2
    table_VC = made.frozen_table_VC.clone()
    with torch.no_grad():
        made.table_VC.add_(1)
    routing = made(hidden(), context(BOUNDARY + 3, steps=1000 * STEPS))
    assert routing.stats["stage"] == 2
    assert all(loss == 0 for loss in routing.losses.values())
    made(hidden(), context(BOUNDARY + 4))
    assert torch.equal(made.frozen_table_VC, table_VC)


def test_state_dict_carries_the_stage(tmp_path: Path) -> None:
    given, hidden_TD = context(BOUNDARY), hidden()
    for step in (BOUNDARY - 1, BOUNDARY):
        made = router(distilled="cnn")
        made(hidden_TD, context(step))
        with torch.no_grad():
            made.table_VC.mul_(-1)  # in stage 2 it no longer counts
        other = router(distilled="cnn")
        other.load_state_dict(made.state_dict())
        for train in (False, True):
            left, right = (r.train(train)(hidden_TD, given) for r in (made, other))
            assert torch.equal(left.expert_N, right.expert_N)
            torch.testing.assert_close(left.weight_N, right.weight_N)


# --- the past: cached decoding, padding, windows -------------------------------------------------


def seen_by_hand(mask: Tensor | None, query: int, b: int, key: int) -> bool:
    """Whether position ``query`` of sequence b may look at ``key``; both from the beginning of all positions."""
    if key == query:
        return True
    if key < 0:
        return False
    if mask is None:
        return True
    return bool(mask[b, key]) if mask.dim() == 2 else bool(mask[min(b, len(mask) - 1), 0, query, key] == 0)


@pytest.mark.parametrize("kind", ["none", "padding", "window"])
@pytest.mark.parametrize("pieces", [[6], [4, 2], [1] * 6, [2, 3, 1]], ids=str)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_recent_tokens(length: int, pieces: list[int], kind: str) -> None:
    from transformers.cache_utils import DynamicCache

    from s2moe.moe.history import History

    total = sum(pieces)
    ids = torch.randint(1, 50, (2, total))
    mask = None
    if kind == "padding":
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    elif kind == "window":  # three positions, as a scoring protocol gives it: additive, one for all sequences
        distance = torch.arange(total)[:, None] - torch.arange(total)
        mask = torch.zeros(total, total).masked_fill((distance < 0) | (distance >= 3), -torch.inf)[None, None]
    history = History(DynamicCache(), 2)
    start = 0
    for new in pieces:
        end = start + new
        given = None if mask is None else mask[:, :end] if kind == "padding" else mask[:, :, start:end, :end]
        token_BSW, seen_BSW = recent(ids[:, start:end], length, history, given)
        assert token_BSW.shape == (2, new, length)
        for b in range(2):
            for s in range(new):
                for back in range(length):
                    key = start + s - back
                    seen = seen_BSW.expand_as(token_BSW)[b, s, back].item()
                    assert seen == seen_by_hand(mask, start + s, b, key), (b, s, back)
                    assert token_BSW[b, s, back] == (ids[b, key] if key >= 0 else 0)
        start = end


@pytest.mark.parametrize("form", ["bigram", "cnn"])
def test_other_forms_stand_what_every_method_must(form: str, tmp_path: Path) -> None:
    moe = {"method": "stablemoe", "router": {"distilled": form, "stage1_fraction": 0.5}}
    conformance.test_evaluation_is_causal(moe)
    for steps in ([1] * 9, [4, 1, 3, 1]):
        conformance.test_decoding_with_the_cache_equals_a_full_pass(moe, steps)
    conformance.test_left_padded_sequences_equal_unpadded_ones(moe, "sdpa")
    conformance.test_a_padded_batch_generates_what_each_prompt_does_alone(moe)
    conformance.test_beam_search_with_the_cache_equals_beam_search_without(moe)
    conformance.test_recomputing_activations_changes_nothing(moe)
    conformance.test_every_parameter_gets_a_finite_gradient_at_every_step(moe)
    conformance.test_padding_changes_no_loss(moe)
    conformance.test_saved_and_loaded_model_gives_the_same_logits(moe, tmp_path)
    conformance.test_half_precision_forward_and_backward_are_finite(moe)


def test_tokens_outside_the_window_of_a_scoring_protocol_have_no_say() -> None:
    model = tiny("stablemoe", {"distilled": "cnn"}, num_hidden_layers=1).double().eval()
    ids = torch.randint(19, (2, 9))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    window = torch.zeros(9, 9, dtype=torch.float64).masked_fill((distance < 0) | (distance >= 3), -torch.inf)
    whole_BSV = model(ids, attention_mask=window[None, None], use_cache=False).logits
    for end in range(3, 10):
        position_ids = torch.arange(end - 3, end)[None]
        alone_BV = model(ids[:, end - 3 : end], position_ids=position_ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(whole_BSV[:, end - 1], alone_BV, **ROTARY)


# --- settings ------------------------------------------------------------------------------------


def test_preset_and_defaults_are_the_papers() -> None:
    config = resolve_moe({"method": "stablemoe"})
    assert config.experts_per_token == 1
    assert config.router == {
        "name": "stablemoe",
        "stage1_fraction": 0.1,
        "schedule_steps": None,
        "distilled": "word",
        "distilled_width": 50,
        "balance_loss": 0.3,
        "balance_scope": "global",
        "distill_loss": 1.0,
        "vocab_size": None,
    }


def test_initial_weights_are_those_of_the_published_code() -> None:
    cls = ROUTERS["stablemoe"]
    made = cls(64, 8, 1, cls.Options(vocab_size=2000, distilled="cnn"))
    for centroid in (made.centroid_ED, made.distilled_centroid_EC):
        torch.testing.assert_close(centroid @ centroid.T, 0.01 * torch.eye(8), rtol=1e-5, atol=1e-7)
    assert made.table_VC.std().item() == pytest.approx(1, rel=0.02)
    assert made.kernel_W.abs().max() <= 5**-0.5
    assert made.in_stage2.item() is False
    assert made.macs_per_token() == 8 * (64 + 50) + 5 * 50


def test_vocabulary_comes_from_the_model() -> None:
    model = tiny("stablemoe")
    assert model.config.moe["router"]["vocab_size"] == 19
    assert model.model.layers[0].moe.router.table_VC.shape == (19, 50)
    again = S2MoEConfig(**model.config.to_dict())
    assert again.moe == model.config.moe
    assert tiny("stablemoe", {"vocab_size": 30}).config.moe["router"]["vocab_size"] == 30
    with pytest.raises(ValueError, match="vocab_size 18 leaves tokens of the model's vocab_size 19 without a route"):
        tiny("stablemoe", {"vocab_size": 18})
    assert "vocab_size" not in tiny("smoe").config.moe["router"]
    counted = model_sizes(model.config)
    assert counted.total == sum(p.numel() for p in model.parameters())


def test_vocabulary_of_a_run_comes_from_the_corpus(tmp_path: Path) -> None:
    path, common = tiny_run(tmp_path)
    config = load(RunConfig, path, [*common, "model.moe.method=stablemoe"])
    assert config.model["vocab_size"] is None
    for corpus in (300, 256):
        assert config.model_config(corpus).moe["router"]["vocab_size"] == corpus
        assert config.model["moe"]["router"]["vocab_size"] is None  # and nothing is remembered
    larger = load(RunConfig, path, [*common, "model.moe.method=stablemoe", "model.vocab_size=512"])
    assert larger.model_config(256).moe["router"]["vocab_size"] == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage1_fraction": 1.5}, r"stage1_fraction must lie in \[0, 1\]"),
        ({"distill_loss": 0.0}, "distill_loss must be positive"),
        ({"distilled_width": 0}, "distilled_width must be at least 1"),
        ({"schedule_steps": 0}, "schedule_steps must be at least 1"),
        ({"vocab_size": None}, "needs the size of the vocabulary: set its option vocab_size"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(**options)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"StableMoE's first stage needs the number of training steps.*schedule_steps"):
        router()(hidden(), context(0, steps=0))
    router(train=False)(hidden(), context(0, steps=0))
    model = tiny("stablemoe").eval()
    with pytest.raises(ValueError, match="routes by token id: give the model input_ids instead of inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 4, 16))


def test_the_noisy_copies_of_s2moe_are_refused() -> None:
    with pytest.raises(ValueError, match="the router 'stablemoe': once it is frozen it routes by the token's identity"):
        tiny("s2moe", {"name": "stablemoe"})


def test_building_in_half_precision() -> None:
    """Which has no orthogonal decomposition."""
    model = AutoModelForCausalLM.from_config(tiny("stablemoe").config, dtype=torch.bfloat16)
    centroid_ED = model.model.layers[0].moe.router.centroid_ED
    assert centroid_ED.dtype == torch.bfloat16
    assert centroid_ED.float().norm(dim=1).tolist() == pytest.approx([0.1] * 4, rel=0.02)


# --- several ranks, whole runs -------------------------------------------------------------------


def balance_on_ranks(scope: str) -> tuple[Tensor, Tensor]:
    """This rank's balance loss over its own tokens, and its gradient of the centroids, averaged over ranks."""
    made, hidden_RTD, token_RT = ranks_inputs(scope)
    rank = dist.get_rank()
    given = RoutingContext(steps=STEPS, token_T=token_RT[rank], group=dist.group.WORLD)
    loss = made(hidden_RTD[rank], given).losses["balance_loss"]
    (gradient_ED,) = torch.autograd.grad(loss, made.centroid_ED)
    for value in (loss := loss.detach(), gradient_ED):
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return loss, gradient_ED


def ranks_inputs(scope: str) -> tuple[Router, Tensor, Tensor]:
    torch.manual_seed(0)
    made = router(balance_loss=1.0, balance_scope=scope)
    return made, torch.randn(2, T, D, dtype=torch.float64), torch.randint(V, (2, T))


@pytest.mark.distributed
def test_balance_over_ranks_is_the_formula_over_the_global_batch() -> None:
    made, hidden_RTD, token_RT = ranks_inputs("global")
    whole = made(hidden_RTD.flatten(0, 1), RoutingContext(steps=STEPS, token_T=token_RT.flatten()))
    loss = whole.losses["balance_loss"]
    (gradient_ED,) = torch.autograd.grad(loss, made.centroid_ED)
    for got, got_gradient in run_distributed(balance_on_ranks, 2, "global"):
        torch.testing.assert_close(got, loss.detach())
        torch.testing.assert_close(got_gradient, gradient_ED)
    apart = [made(h, RoutingContext(steps=STEPS, token_T=t)) for h, t in zip(hidden_RTD, token_RT, strict=True)]
    mean = torch.stack([routing.losses["balance_loss"].detach() for routing in apart]).mean()
    assert (mean - loss).abs() > 1e-3
    for got, _ in run_distributed(balance_on_ranks, 2, "local"):
        torch.testing.assert_close(got, mean)


@pytest.mark.distributed
def test_training_does_not_depend_on_the_layout() -> None:
    """The stage changes within the run, under ZeRO 1 to 3."""
    options = {"distilled": "cnn", "schedule_steps": 4, "stage1_fraction": 0.5}
    layouts.test_training_does_not_depend_on_the_layout({"method": "stablemoe", "router": options})


RUN = [
    "model.moe.method=stablemoe",
    "model.moe.router.stage1_fraction=0.5",  # steps 0, 1, 2
    "model.moe.router.distilled=cnn",
    "optimizer.weight_decay=1.0",
    "logging.sample_tokens=0",
]


class Runs:
    """Runs of the tiny configuration in one directory."""

    def __init__(self, directory: Path, *common: str, ranks: int = 1) -> None:
        self.directory, self.ranks = directory, ranks
        self.path, given = tiny_run(directory)
        self.common = [*given, *RUN, *common]

    def run(self, name: str, *overrides: str) -> dict[str, Any]:
        given = [*self.common, f"name={name}", *overrides]
        return run_distributed(TRAIN, self.ranks, self.path, given)[0]

    def log(self, name: str) -> list[dict[str, Any]]:
        return reproducible_events(self.directory / "runs" / name)

    def model(self, name: str) -> S2MoEForCausalLM:
        return load_weights(find_weights(self.directory / "runs" / name))


def assert_same_run(runs: Runs, left: str, right: str) -> None:
    assert runs.log(left) == runs.log(right)
    first, second = (runs.model(name).state_dict() for name in (left, right))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_continues_exactly_in_both_stages_and_at_the_boundary(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert runs.run("whole", "evaluation.every=3")["finished"]  # validated between the stages, too
    stages = [event["layer_0/stage"] for event in runs.log("whole") if "train/loss" in event]
    assert stages == [1, 1, 1, 2, 2, 2]
    for step in (1, 2, 3, 4):
        assert runs.run("parts", "training.stop_after_minutes=1e-9")["step"] == step
    assert runs.run("parts", "checkpoint.resume=must")["finished"]
    assert_same_run(runs, "parts", "whole")

    written = load(RunConfig, tmp_path / "runs" / "whole" / "config.yaml")
    assert written.model["moe"]["router"]["vocab_size"] == 256
    model = runs.model("whole")
    for layer in model.model.layers:
        made = layer.moe.router
        assert made.in_stage2.item() is True
        assert (made.table_VC - made.frozen_table_VC).abs().max() > 1e-3  # decay went on, without effect
    ids = torch.randint(256, (1, 8))
    before = model(ids).logits
    with torch.no_grad():
        for layer in model.model.layers:
            layer.moe.router.table_VC.zero_()
    assert torch.equal(model(ids).logits, before)


def test_a_lengthened_run_stays_in_the_second_stage(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "evaluation.every=0")
    assert runs.run("long", "training.steps=4")["finished"]
    frozen = runs.model("long").model.layers[0].moe.router.frozen_table_VC
    assert runs.run("long", "training.steps=12")["finished"]  # whose first stage would have six steps
    assert [event["layer_0/stage"] for event in runs.log("long") if "train/loss" in event][2:] == [2] * 10
    assert torch.equal(runs.model("long").model.layers[0].moe.router.frozen_table_VC, frozen)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_continue_exactly_under_zero_3(tmp_path: Path) -> None:
    shape = ("training.zero_stage=3", "training.expert_parallel=2", "training.precision=bf16", "evaluation.every=0")
    runs = Runs(tmp_path, *shape, "training.activation_checkpointing=true", "training.micro_batch=1", ranks=2)
    assert runs.run("pair", "checkpoint.every=3")["finished"]
    log, state = runs.log("pair"), runs.model("pair").state_dict()
    shutil.rmtree(tmp_path / "runs" / "pair" / "checkpoints" / "step-00000006")
    assert runs.run("pair", "checkpoint.every=3", "checkpoint.resume=must")["finished"]  # from the boundary
    assert runs.log("pair") == log
    made = runs.model("pair")
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    for layer in made.model.layers:
        assert layer.moe.router.in_stage2.item() is True
        assert layer.moe.router.frozen_table_VC.dtype == torch.float32
        assert layer.moe.router.frozen_table_VC.abs().max() > 1
