"""SMoE-Dropout: the frozen random router, its weights, and its numbers of experts against the equations.

Legend: T tokens, D model, E experts, K choices, N assignments.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.moe.config import resolve_moe
from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import RoutingContext
from s2moe.parallel.deepspeed_compat import optimizer_groups
from s2moe.training.metrics_log import read
from s2moe.training.weights import find_weights, load_weights
from tests.distributed import test_expert_parallel as layouts
from tests.distributed_harness import run_distributed
from tests.methods import test_conformance as conformance
from tests.models.decoder import tiny
from tests.moe import reference
from tests.training.jobs import tiny_run

T, D, E = 10, 6, 5
TRAIN = "tests.training.jobs:train"


def router(k: int = E, experts: int = E, train: bool = True, **options: Any) -> Router:
    cls = ROUTERS["smoe_dropout"]
    made = cls(D, experts, k, cls.Options(**options)).double()
    made.reset_parameters(1.0)
    return made.train(train)


def published(mode: str, step: int, steps: int, least: int, most: int) -> int:
    """k_t as the authors' code computes it for 16 experts, one formula a mode, held within the fewest and the most."""
    if mode == "linear_increase":
        return round((most - least) * step / steps) + least
    if mode == "linear_decrease":
        return round((least - most) * step / steps) + most
    if mode == "cosine_increase":
        return round((least - most) * math.cos(math.pi * step / (2 * steps))) + most
    if mode == "cosine_decrease":
        return round((most - least) * math.cos(math.pi * step / (2 * steps))) + least
    if mode == "exponential_increase":
        return round((least - most) * 0.99 ** (step // (steps // 300))) + most
    ladder = [1, 2, 4, 8, 16] if mode == "steps_increase" else [16, 8, 4, 2, 1]
    return min(max(ladder[int(5 * step / steps)], least), most)


MODES = (
    "linear_increase",
    "linear_decrease",
    "cosine_increase",
    "cosine_decrease",
    "exponential_increase",
    "steps_increase",
    "steps_decrease",
)


@pytest.mark.parametrize("steps", [300, 600, 1000, 899])
@pytest.mark.parametrize(("least", "most"), [(8, 16), (1, 16), (2, 5)])
@pytest.mark.parametrize("mode", MODES)
def test_schedules_are_the_published_ones(mode: str, least: int, most: int, steps: int) -> None:
    schedule, direction = mode.split("_")
    first, last = (least, most) if direction == "increase" else (most, least)
    made = router(last, 16, schedule=schedule, first_experts=first)
    chosen = [made.choices(RoutingContext(step=step, steps=steps)) for step in range(steps)]
    assert chosen == [published(mode, step, steps, least, most) for step in range(steps)]
    assert chosen[0] == first
    assert made.choices(RoutingContext(step=steps, steps=steps)) == last
    assert made.choices(RoutingContext(step=9999, steps=steps)) == last


def test_the_exponential_schedule_of_a_short_run_has_the_same_curve() -> None:
    """Below 300 steps the authors' code divides by zero."""
    made = router(16, 16, schedule="exponential", first_experts=1)
    short, long = (
        [made.choices(RoutingContext(step=step, steps=steps)) for step in range(0, steps, steps // 60)]
        for steps in (60, 600)
    )
    assert short == long


def test_published_default_is_8_to_16_experts_linearly() -> None:
    """Of 16 experts: half of them at first, all at the end, twelve on average."""
    made = router(16, 16)
    chosen = [made.choices(RoutingContext(step=step, steps=1600)) for step in range(1600)]
    assert (chosen[0], chosen[100], chosen[101], chosen[800], chosen[1499], chosen[1501]) == (8, 8, 9, 12, 15, 16)
    assert chosen == sorted(chosen)
    assert sum(chosen) / 1600 == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize(
    ("experts", "first", "last", "want"),
    [
        (16, 8, 16, [8, 8, 8, 8, 16]),
        (16, 3, 10, [3, 3, 4, 8, 10]),
        (16, 10, 3, [10, 8, 4, 3, 3]),
        (16, 4, 4, [4, 4, 4, 4, 4]),
        (8, 1, 8, [1, 2, 4, 8]),
        (6, 1, 6, [1, 2, 4, 6]),
        (1, 1, 1, [1]),
    ],
)
def test_stays_at_powers_of_two_held_between_two_numbers(experts: int, first: int, last: int, want: list[int]) -> None:
    made = router(last, experts, schedule="steps", first_experts=first)
    steps = len(want) * 3
    visited = [made.choices(RoutingContext(step=step, steps=steps)) for step in range(steps)]
    assert visited == [k for k in want for _ in range(3)]
    assert made.mean_choices(training=True) == pytest.approx(sum(want) / len(want))


def test_given_schedule_steps_take_the_place_of_the_runs() -> None:
    made = router(4, 8, schedule_steps=10)
    assert made.choices(RoutingContext(step=10, steps=1000)) == 4
    assert made.choices(RoutingContext(step=1)) == 2
    with pytest.raises(ValueError, match=r"SMoE-Dropout needs the number of training steps.*schedule_steps"):
        router(4, 8).choices(RoutingContext(step=1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_choice_weights_and_gradient_equal_the_equations(k: int, train: bool, padded: bool) -> None:
    made = router(k, train=train, first_experts=k)
    hidden_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    mask_T = torch.arange(T) % 4 != 1 if padded else None
    routing = made(hidden_TD, RoutingContext(step=3, steps=9, mask_T=mask_T))

    want: list[tuple[int, int, Tensor]] = []
    load = [0] * E
    for t, h_D in enumerate(hidden_TD):
        logits_E = torch.stack([made.weight_ED[e] @ h_D for e in range(E)])
        chosen = reference.best(logits_E, k)
        total = sum(torch.exp(logits_E[a]) for a in chosen)
        want += [(t, a, torch.exp(logits_E[a]) / total) for a in chosen]
        for a in chosen:
            load[a] += mask_T is None or bool(mask_T[t])
    assert routing.token_N.tolist() == [t for t, _, _ in want]
    assert routing.expert_N.tolist() == [a for _, a, _ in want]
    assert routing.load_E.tolist() == load
    assert routing.choices == k
    assert routing.losses == {}
    want_N = torch.stack([w for _, _, w in want])
    torch.testing.assert_close(routing.weight_N, want_N)
    if k == 1:
        assert torch.equal(routing.weight_N, torch.ones(T))  # allowed here: no router has to learn from it
        return
    direction_N = torch.randn(T * k, dtype=torch.float64)
    got, wanted = (torch.autograd.grad((w * direction_N).sum(), hidden_TD)[0] for w in (routing.weight_N, want_N))
    assert wanted.norm() > 1e-3
    torch.testing.assert_close(got, wanted)


def test_evaluation_takes_the_last_number_of_experts_or_any_other() -> None:
    hidden_TD = torch.randn(T, D, dtype=torch.float64)
    made = router(4, train=False)
    assert made(hidden_TD, RoutingContext()).choices == 4
    for k in range(1, E + 1):
        routing = made(hidden_TD, RoutingContext(experts_per_token=k))
        assert routing.choices == k
        assert routing.weight_N.view(T, k).sum(1).allclose(torch.ones(T, dtype=torch.float64))
    decreasing = router(2, train=False, first_experts=4)
    assert decreasing(hidden_TD, RoutingContext()).choices == 2
    with pytest.raises(ValueError, match=r"must lie in 1\.\.5"):
        made(hidden_TD, RoutingContext(experts_per_token=E + 1))


def test_presets() -> None:
    for num_experts in (4, 16):
        config = resolve_moe({"method": "smoe_dropout", "num_experts": num_experts})
        assert config.experts_per_token == num_experts
        assert config.router == {
            "name": "smoe_dropout",
            "schedule": "linear",
            "first_experts": None,
            "schedule_steps": None,
        }
    assert resolve_moe({"method": "smoe_dropout", "experts_per_token": 3}).experts_per_token == 3
    fixed = resolve_moe({"method": "frozen_random"})
    assert (fixed.experts_per_token, fixed.router["schedule"]) == (2, "constant")
    model = tiny("frozen_random")
    routing = model(torch.randint(19, (2, 8)), labels=torch.randint(19, (2, 8))).routing  # no run's length needed
    assert [layer.counts_E.sum().item() for layer in routing] == [2 * 16] * 3


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (4, {"first_experts": 0}, r"first_experts must lie in 1\.\.5"),
        (4, {"first_experts": 6}, r"first_experts must lie in 1\.\.5"),
        (4, {"schedule_steps": 0}, "schedule_steps must be at least 1"),
        (4, {"schedule": "constant", "first_experts": 2}, "no meaning with schedule=constant"),
    ],
)
def test_impossible_settings_are_refused(k: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(k, **options)
    router(4, schedule="constant", first_experts=4)


def test_no_optimizer_knows_the_router() -> None:
    model = tiny("smoe_dropout")
    known = {id(p) for group in optimizer_groups(model, 0.1) for p in group["params"]}
    assert not any("router" in name for name, _ in model.named_parameters())
    for layer in model.model.layers:
        assert layer.moe.router.weight_ED.shape == (4, 16)
        assert not layer.moe.router.weight_ED.requires_grad
        assert id(layer.moe.router.weight_ED) not in known


def test_router_is_drawn_with_the_models_spread_from_torchs_seed() -> None:
    def weights(seed: int, **given: Any) -> Tensor:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 5, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
        moe = {"method": "smoe_dropout", "num_experts": 16, "expert_hidden": 4}
        return S2MoEForCausalLM(S2MoEConfig(**sizes, **given, moe=moe)).model.layers[0].moe.router.weight_ED

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert weights(1).std().item() == pytest.approx(0.02, rel=0.05)
    assert weights(1, initializer_range=0.3).std().item() == pytest.approx(0.3, rel=0.05)


def test_saving_and_loading_keeps_the_router_exactly(tmp_path: Path) -> None:
    model = tiny("smoe_dropout").to(torch.bfloat16)
    wanted = [layer.moe.router.weight_ED.clone() for layer in model.model.layers]
    model.save_pretrained(tmp_path)
    torch.manual_seed(77)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = S2MoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for layer, weight_ED in zip(loaded.model.layers, wanted, strict=True):
            assert layer.moe.router.weight_ED.dtype == torch.float32
            assert torch.equal(layer.moe.router.weight_ED, weight_ED)
            assert not torch.equal(weight_ED, weight_ED.bfloat16().float())  # rounding would show


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_other_schedules_stand_what_every_method_must(schedule: str, tmp_path: Path) -> None:
    moe = {"method": "smoe_dropout", "router": {"schedule": schedule, "first_experts": 1}}
    conformance.test_evaluation_is_causal(moe)
    conformance.test_recomputing_activations_changes_nothing(moe)
    conformance.test_what_layers_report_has_the_same_names_at_every_step(moe)
    conformance.test_every_parameter_gets_a_finite_gradient_at_every_step(moe)
    conformance.test_saved_and_loaded_model_gives_the_same_logits(moe, tmp_path)


@pytest.mark.distributed
def test_training_does_not_depend_on_the_layout() -> None:
    """k grows from 2 to 4 within the run; the router is the same on all ranks, and stays as it was drawn."""
    layouts.test_training_does_not_depend_on_the_layout({"method": "smoe_dropout", "router": {"schedule_steps": 4}})


def test_a_run_follows_the_schedule_through_interruptions(tmp_path: Path) -> None:
    path, common = tiny_run(tmp_path)
    common += ["model.moe.method=smoe_dropout", "evaluation.every=0", "logging.sample_tokens=0"]

    def run(*overrides: str) -> dict[str, Any]:
        return run_distributed(TRAIN, 1, path, [*common, *overrides])[0]

    def chosen(name: str) -> list[float]:
        log = read(tmp_path / "runs" / name / "metrics.jsonl")
        return [event["layer_1/experts_per_token"] for event in log if "train/loss" in event]

    assert run("name=whole")["finished"]
    assert chosen("whole") == [2, 2, 3, 3, 3, 4]  # round(2 t / 6) + 2
    for step in (1, 2, 3):
        assert run("name=parts", "training.stop_after_minutes=1e-9")["step"] == step
    assert run("name=parts")["finished"]
    assert chosen("parts") == chosen("whole")
    whole, parts = (load_weights(find_weights(tmp_path / "runs" / name)).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    config = load(RunConfig, path, common).model_config(256)
    torch.manual_seed(1)
    for name, drawn in S2MoEForCausalLM(config).named_buffers():
        if "router" in name:
            assert torch.equal(whole[name], drawn), name  # as at the beginning
