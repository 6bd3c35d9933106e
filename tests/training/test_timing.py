"""What a run sees of itself: phases, parts of the layers, imbalance between ranks, traces, the closing table."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from s2moe.config import ConfigError
from s2moe.config.run import ProfileConfig
from s2moe.parallel.regions import ALL_TO_ALL, DISPATCH, EXPERTS
from s2moe.training import metrics_log
from s2moe.training.layer_times import LayerTimes, part_seconds
from s2moe.training.phases import MOST_PENDING, PhaseClock
from s2moe.training.profiler import make_profiler
from s2moe.training.rank_loads import slowest_rank
from s2moe.training.timing_table import timing_table
from s2moe.training.trace import Trace
from tests.distributed_harness import run_distributed

from .jobs import tiny_run

CPU = torch.device("cpu")
FORWARD_SECONDS, BACKWARD_SECONDS = 0.02, 0.05


class FakeEvent:
    """A CUDA event of a device that is `now` seconds into its work; one lies a second after the one before."""

    now, made, recorded = 0.0, 0, 0.0

    def __init__(self) -> None:
        FakeEvent.made += 1

    def record(self) -> None:
        FakeEvent.recorded += 1.0
        self.at = FakeEvent.recorded

    def query(self) -> bool:
        return self.at <= FakeEvent.now

    def synchronize(self) -> None:
        FakeEvent.now = max(FakeEvent.now, self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query()
        return (end.at - self.at) * 1e3


def test_phases_add_up_on_the_cpu() -> None:
    clock = PhaseClock(CPU)
    for _ in range(2):
        with clock("data"):
            time.sleep(0.02)
        with clock("forward"):
            pass
    seconds = clock.read()
    assert 0.04 <= seconds["data"] < 0.2
    assert seconds["forward"] < 0.01
    assert clock.read() == {}


def test_gpu_phases_are_read_without_waiting_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeEvent, "made", 0)
    monkeypatch.setattr(FakeEvent, "recorded", 0.0)
    clock = PhaseClock(CPU, FakeEvent)
    for _ in range(MOST_PENDING + 10):
        with clock("forward"):
            pass
    assert FakeEvent.now == 0  # the device was never waited for
    assert clock.read() == {"forward": MOST_PENDING + 10.0}
    made = FakeEvent.made
    with clock("step"):
        pass
    assert clock.read() == {"step": 1.0}
    assert FakeEvent.made == made  # events are used again


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        time.sleep(FORWARD_SECONDS)
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        _ = ctx.saved_tensors  # recomputed here, where activations are checkpointed
        time.sleep(BACKWARD_SECONDS)
        return gradient


def labelled(value: torch.Tensor) -> torch.Tensor:
    """A layer: something outside, and experts and an all-to-all within dispatch."""
    value = Slow.apply(value)  # no part's
    with record_function(DISPATCH):
        value = Slow.apply(value)
        with record_function(EXPERTS):
            value = Slow.apply(Slow.apply(value))
        with record_function(ALL_TO_ALL):
            return value * value  # recomputation of everything begins in its backward


@pytest.mark.parametrize("recomputed", [False, True])
def test_backward_is_charged_to_the_part_of_its_forward(recomputed: bool) -> None:
    value = torch.zeros(4, requires_grad=True)
    with make_profiler(CPU) as profiler:
        out = checkpoint(labelled, value, use_reentrant=False, early_stop=False) if recomputed else labelled(value)
        out.sum().backward()
    seconds = part_seconds(profiler.events())
    once = FORWARD_SECONDS * (2 if recomputed else 1) + BACKWARD_SECONDS
    assert seconds["dispatch"] == pytest.approx(once, abs=0.02)
    assert seconds["experts"] == pytest.approx(2 * once, abs=0.03)
    assert seconds["all_to_all"] < 0.01


def test_samples_are_due_early_and_then_rarely() -> None:
    times = LayerTimes(500, CPU, print)
    assert [step for step in range(1, 1501) if times.is_due(step)] == [10, 500, 1000, 1500]
    assert not any(LayerTimes(0, CPU, print).is_due(step) for step in range(1, 50))


def test_a_profiler_that_fails_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(profiler: Any) -> None:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(torch.profiler.profile, "start", start)
    said: list[str] = []
    times = LayerTimes(1, CPU, said.append)
    with times.sample():
        pass
    assert not times.is_due(10)
    trace = Trace((1, 2), tmp_path, 0, CPU, said.append)
    trace.before(1)
    trace.after(1)
    trace.close()
    assert len(said) == 2
    assert all("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" in text for text in said)


def test_an_error_within_a_sample_is_passed_on() -> None:
    times = LayerTimes(1, CPU, print)
    with pytest.raises(KeyError), times.sample():
        raise KeyError("of the step")


def test_a_trace_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    said: list[str] = []
    trace = Trace((1, 1), tmp_path, 0, CPU, said.append)
    trace.before(1)
    trace.after(1)
    assert "could not be written" in said[0]


def test_slowest_rank() -> None:
    rows_MLP = torch.tensor([[[10, 30], [20, 20]], [[40, 0], [0, 0]]])
    mean, largest = slowest_rank(rows_MLP)
    assert mean == pytest.approx((1.5 + 1 + 2 + 0) / 4)
    assert largest == 2


@pytest.mark.parametrize("steps", ["12-10", "a", "0-3", 0, "-3", "3-"])
def test_impossible_steps_to_trace(steps: str | int) -> None:
    if steps == "3-":
        assert ProfileConfig(steps).range() == (3, 3)
        return
    with pytest.raises(ConfigError, match=r"profile\.steps: must be a step or a range of steps such as 10-12"):
        ProfileConfig(steps)


def test_table_weighs_events_with_their_steps() -> None:
    def event(step: int, forward: float, speed: float) -> dict[str, float]:
        zero = {
            f"time/{name}{end}": 0.0
            for name in ("data", "backward", "wait", "step", "other")
            for end in ("", "_slowest")
        }
        own = {"time/forward": forward, "time/forward_slowest": 2 * forward}
        return {"step": step, "tokens_per_second": speed, "memory_gib": 1.0, **zero, **own}

    events = [event(1, 1.0, 100.0), {"step": 1, "val/bpc": 3.0}, event(4, 0.2, 500.0) | {"time/checkpoint": 3.0}]
    lines = timing_table(events, {"time/checkpoint": 2.0}).splitlines()
    assert lines[2].split() == ["forward", "400.0", "800.0", "100.0%"]
    assert "  checkpoint: 5.0 s in all" in lines
    assert lines[-1] == "  250 tokens/s, at most 1.00 GiB a process"
    assert timing_table([{"step": 1, "train/loss": 2.0}], {}) == ""


@pytest.mark.distributed
def test_two_ranks_see_themselves(tmp_path: Path) -> None:
    path, common = tiny_run(tmp_path)
    overrides = [
        *common,
        "training.expert_parallel=2",
        "training.micro_batch=1",
        "profile.layers_every=2",
        "profile.steps=3-4",
        "training.steps=7",
    ]
    table = run_distributed("tests.training.timing_jobs:train_with_a_slow_rank", 2, path, overrides, timeout=280)[0]
    run = tmp_path / "runs" / "tiny"
    events = {e["step"]: e for e in metrics_log.read(run / "metrics.jsonl") if "train/loss" in e}
    for event in events.values():
        # Rank 1 is slow in loading data, 2 micro-batches of 0.1 s, and the mean knows of the other rank as well.
        assert event["time/data_slowest"] > 0.2
        assert event["time/data_slowest"] / 2 <= event["time/data"] < 0.8 * event["time/data_slowest"]
        phases = sum(event[f"time/{name}"] for name in ("data", "forward", "backward", "wait", "step", "other"))
        # All of the step is in some phase. The speed is by the first process' clock, the phases are the mean of both.
        assert 0.5 < phases * event["tokens_per_second"] / (4 * 32) < 2
        loads = [event[f"layer_{layer}/load"] for layer in (0, 1)]
        assert 1 <= event["expert_parallel/imbalance"] <= event["expert_parallel/imbalance_max"] <= 2
        if event["step"] == 2:  # mean of 2 micro-batches' ratios; at least the ratio of their sums
            busiest = [max(sum(load[:2]), sum(load[2:])) / 2 for load in loads]
            assert event["expert_parallel/imbalance"] >= sum(busiest) / 2 - 1e-3
    sampled = [step for step, event in events.items() if "time/experts" in event]
    assert sampled == [2, 6]  # not 4, which is traced
    for step in sampled:
        parts = [events[step][f"time/{name}"] for name in ("dispatch", "all_to_all", "experts")]
        assert all(part > 0 for part in parts)

    for rank in (0, 1):
        file = run / "profile" / f"steps-3-4.rank{rank}.pt.trace.json.gz"
        names = [e.get("name") for e in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
        assert names.count("s2moe::forward") == names.count("s2moe::backward") == 4
        assert names.count("s2moe::step") == 4
        assert {DISPATCH, ALL_TO_ALL, EXPERTS} <= set(names)
    for part in ("forward", "all_to_all", "checkpoint: ", "busiest rank's experts", "GiB a process"):
        assert part in table
