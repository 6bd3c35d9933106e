"""The cost model: FLOPs against torch's counter, imbalance against exact draws, links by hand, and how they add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.config import ConfigError, load
from s2moe.config.run import RunConfig
from s2moe.models.sizes import model_sizes
from s2moe.planning import cost
from s2moe.planning.calibration import Efficiency, calibrate
from s2moe.planning.communication import (
    REACHED,
    Group,
    all_to_all_seconds,
    communication,
    copies_group,
    expert_group,
    ring_seconds,
)
from s2moe.planning.cost import flops, step_time
from s2moe.planning.imbalance import Imbalance, simulate
from s2moe.planning.machines import MACHINES, machine

from .jobs import forward

LARGE = Path(__file__).resolve().parents[2] / "configs" / "large_10b.yaml"
EVEN = Imbalance(1.0, 1.0, 1.0)


def addmm_flops(self_shape: Any, first: Any, second: Any, *_: Any, **__: Any) -> int:
    return 2 * first[0] * first[1] * second[1]


@pytest.mark.parametrize(
    "moe",
    [
        {"method": "smoe", "first_dense": 3},
        {"method": "smoe"},
        {"method": "smoe", "expert_form": "mlp", "shared_experts": 1, "every": 2},
        {"method": "s2moe", "stochastic": {"contrast_loss": 0.0}},
        {"method": "xmoe"},
    ],
)
@pytest.mark.parametrize("groups", [4, 1])
def test_flops_are_those_that_torch_counts(moe: dict[str, Any], groups: int) -> None:
    """Eager attention, whose products torch counts; it computes the whole square, of which the model needs half."""
    sequences, length = 2, 128
    config = S2MoEConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=groups,
        intermediate_size=512,
        moe={"num_experts": 8, "expert_hidden": 256, **moe},
    )
    model = S2MoEForCausalLM._from_config(config, attn_implementation="eager").train()
    tokens = torch.randint(0, 64, (sequences, length + 1))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        forward(model, tokens).loss.backward()
    sizes = model_sizes(config)
    upper_half = 6 * sizes.attention_macs_per_position * length // 2
    expected = (sizes.flops_per_token(length) + upper_half) * sequences * length
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_experts_and_the_rest_share_the_flops() -> None:
    config = load(RunConfig, LARGE)
    model = config.model_config(32000)
    sizes = model_sizes(model)
    experts, rest = flops(config, model, sizes, 100)
    assert experts + rest == pytest.approx(100 * sizes.flops_per_token(4096))
    # Each of 4 experts, for clean and noisy tokens: three matrices in 23 layers.
    assert experts == 100 * 6 * 23 * 2 * 4 * 3 * 2048 * 1408


def test_busiest_rank_without_skew_is_multinomial() -> None:
    """Independent tokens and even experts: the mean of the largest of four multinomial counts."""
    tokens, ranks = 4000, 4
    found = simulate(16, ranks, 1, 64, 64, tokens, sequences=tokens, load_cv=0.0)
    draws = np.random.default_rng(1).multinomial(tokens, [1 / ranks] * ranks, size=20000).max(1) / tokens * ranks
    assert found.mean - 1 == pytest.approx(draws.mean() - 1, rel=0.03)


def test_skewed_experts_are_those_that_runs_log() -> None:
    """One expert a rank and endless tokens: the busiest rank is the busiest of Dirichlet's shares."""
    experts, load_cv = 8, 0.5
    total = (experts - 1) / load_cv**2 - 1
    shares = np.random.default_rng(1).dirichlet([total / experts] * experts, size=50000) * experts
    assert shares.std() == pytest.approx(load_cv, rel=0.02)
    found = simulate(experts, experts, 1, 200, 1, 1e12, sequences=1e12, load_cv=load_cv)
    assert found.mean == pytest.approx(shares.max(1).mean(), rel=0.02)


def test_imbalance_grows_with_skew_ranks_and_groups() -> None:
    common: dict[str, Any] = {"layers": 8, "micro_batches": 2, "assignments": 8192.0, "sequences": 8.0}

    def mean(ranks: int, groups: int, load_cv: float) -> float:
        return simulate(64, ranks, groups, load_cv=load_cv, **common).mean

    assert mean(1, 8, 1.0) == 1
    assert mean(8, 8, 0.1) < mean(8, 8, 0.5) < mean(8, 8, 1.0) < 8
    assert mean(2, 8, 0.5) < mean(8, 8, 0.5) < mean(32, 8, 0.5)
    assert mean(8, 1, 0.0) < mean(8, 512, 0.0)
    found = simulate(64, 8, 8, load_cv=0.5, **common)
    assert 1 < found.mean <= found.p95 <= found.peak
    assert found == simulate(64, 8, 8, load_cv=0.5, **common)


def test_thousands_of_ranks_take_seconds() -> None:
    found = simulate(256, 64, 4096 // 64, 60, 16, 64 * 8192.0, sequences=64.0, load_cv=0.3)
    assert 1 < found.mean < 2


def test_links() -> None:
    gpu = replace(MACHINES["h100"], link=100e9, network=10e9, link_latency=0.0, network_latency=0.0)
    within, between = REACHED * 100e9, REACHED * 10e9
    assert ring_seconds(7e9, Group(8, 8), gpu) == pytest.approx(7e9 / within)
    assert ring_seconds(3e9, Group(4, 1), gpu) == pytest.approx(3e9 / between)
    # 16 processes, 8 a machine: of 16 GB, 7/8 pass inside, and 1/8 x 1/2 of it each GPU's network.
    assert ring_seconds(15e9, Group(16, 8), gpu) == pytest.approx(14e9 / within + 1e9 / between)
    assert all_to_all_seconds(15e9, Group(16, 8), gpu) == pytest.approx(7e9 / within + 8e9 / between)
    assert ring_seconds(0.0, Group(1, 1), gpu) == all_to_all_seconds(0.0, Group(1, 1), gpu) == 0
    slow = replace(gpu, network_latency=1.0)
    assert ring_seconds(0.0, Group(16, 8), slow, messages=3) == pytest.approx(3.0)


def test_groups() -> None:
    assert expert_group(4, 8) == Group(4, 4)
    assert expert_group(16, 8) == Group(16, 8)
    assert copies_group(64, 4, 8) == Group(16, 2)
    assert copies_group(64, 16, 8) == Group(4, 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_volume(stage: int) -> None:
    """64 processes, 8 of them for a copy of the experts, 4 micro-batches of 4 sequences, by hand."""
    shape = ["training.expert_parallel=8", "training.activation_checkpointing=false", f"training.zero_stage={stage}"]
    config = load(RunConfig, LARGE, shape)
    model = config.model_config(32000)
    sizes = model_sizes(model)
    volume = communication(config, model, sizes, MACHINES["h100"], 64, 8).volume
    rows = 4 * 4096 * 4 * 2
    assert volume.all_to_all == pytest.approx(4 * 23 * 4 * rows * 2048 * 2 * 7 / 8)
    dense, experts = (sizes.total - sizes.experts) * 63 / 64, sizes.experts / 8 * 7 / 8
    reduced = {1: 2 * 4, 2: 2 * 2 * 4, 3: 2 * 4}[stage]
    gathered = {1: 2, 2: 2, 3: 2 * 2 * 4}[stage]
    assert volume.dense_reduce == pytest.approx(reduced * dense)
    assert volume.dense_gather == pytest.approx(gathered * dense)
    assert volume.expert_reduce == pytest.approx(reduced * experts)
    assert volume.expert_gather == pytest.approx(gathered * experts)
    again = load(RunConfig, LARGE, [*shape[:1], shape[2], "training.activation_checkpointing=true"])
    repeated = communication(again, model, sizes, MACHINES["h100"], 64, 8).volume
    assert repeated.all_to_all == pytest.approx(1.5 * volume.all_to_all)


def test_step_time_is_the_peak_where_nothing_else_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.HALF_FILLED, True, 0.0)
    config = load(RunConfig, LARGE, ["training.expert_parallel=1", "training.activation_checkpointing=false"])
    model = config.model_config(32000)
    sizes = model_sizes(model)
    ideal = replace(MACHINES["h100"], memory_bandwidth=1e30, host_seconds_per_layer=0.0)
    found = step_time(config, model, sizes, ideal, Efficiency(1.0, 1.0, ""), EVEN, 1, 1)
    tokens = 1024 * 4096
    assert found.dense + found.experts == pytest.approx(sizes.flops_per_token(4096) * tokens / 989e12)
    assert found.total == pytest.approx(found.dense + found.experts)


def test_step_time_of_the_slowest_rank() -> None:
    config = load(RunConfig, LARGE)
    model = config.model_config(32000)
    sizes, efficiency = model_sizes(model), Efficiency(0.5, 0.5, "")
    even, uneven = (
        step_time(config, model, sizes, MACHINES["h100"], efficiency, imbalance, 64, 8)
        for imbalance in (EVEN, Imbalance(1.5, 2.0, 3.0))
    )
    assert uneven.experts == pytest.approx(1.5 * even.experts)
    assert uneven.all_to_all == pytest.approx(1.5 * even.all_to_all)
    assert uneven.dense == even.dense
    assert uneven.p95 == pytest.approx(even.total + even.experts + even.all_to_all)
    assert even.p95 == pytest.approx(even.total)


def test_a_small_model_waits_for_the_host() -> None:
    config = load(RunConfig, LARGE, ["training.micro_batch=1", "training.sequence_length=16"])
    model = config.model_config(32000)
    found = step_time(config, model, model_sizes(model), MACHINES["h200"], Efficiency(0.5, 0.5, ""), EVEN, 64, 8)
    assert found.host > found.dense + found.experts


def benchmark(device: str, dtype: str, times: dict[str, float]) -> dict[str, Any]:
    rows = [{"shape": [4096, 1024, 2048, 8, 2], "implementation": name, "ms": ms} for name, ms in times.items()]
    return {"header": {"device": device, "dtype": dtype, "threads": 1}, "rows": rows}


def test_efficiency_is_measured_where_it_was(tmp_path: Path) -> None:
    work = 18 * 4096 * 1024 * 2048 * 2
    times = {"dense": 1e3 * work / 494.5e12, "smoe": 1e3 * work / 395.6e12}
    content = benchmark("NVIDIA H100 80GB HBM3", "bfloat16", times)
    (tmp_path / "h100.json").write_text(json.dumps(content))
    _, found = calibrate(machine("h100"), "bf16", results=tmp_path)
    assert found.dense == pytest.approx(0.5)
    assert found.experts == pytest.approx(0.4)
    assert "h100.json" in found.source
    for other in (("h200", "bf16"), ("h100", "fp32"), ("gh200", "bf16")):
        _, found = calibrate(machine(other[0]), other[1], results=tmp_path)
        assert found.source.startswith("assumed")


def test_the_cpu_is_calibrated_by_the_benchmarks_of_this_project() -> None:
    found, efficiency = calibrate(machine("cpu"), "fp32")
    assert efficiency.source.startswith("measured")
    assert 5e9 < found.peak("fp32") < 200e9
    assert 0.5 < efficiency.experts <= 1


def test_links_measured_by_the_doctor(tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    links = {
        "within a machine": {"processes": 8, "latency": 2e-5, "bandwidth": 160e9},
        "of all processes": {"processes": 16, "latency": 8e-5, "bandwidth": 20e9},
    }
    path.write_text(json.dumps({"measured": {"all_to_all": links}}))
    found, _ = calibrate(machine("h100"), "bf16", path)
    assert (REACHED * found.link, REACHED * found.network) == pytest.approx((160e9, 20e9))
    path.write_text(json.dumps({"measured": {"all_to_all": {}}}))
    with pytest.raises(ConfigError, match="comes from one process"):
        calibrate(machine("h100"), "bf16", path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"is not what launcher/doctor\.py --json writes"):
        calibrate(machine("h100"), "bf16", path)


def test_unknown_gpu() -> None:
    with pytest.raises(ConfigError, match="unknown 'h20O', did you mean 'h200'"):
        machine("h20O")
    assert machine("a100-80", memory_gib=64, network_gbit=100).network == 12.5e9
