#!/usr/bin/env python
"""What a run's own clocks cost: steps with and without them take turns in one process.

    python benchmarks/timing_overhead.py
    python benchmarks/timing_overhead.py --steps 200 model.hidden_size=256

Settings on top of configs/quickstart.yaml. Printed are the ratio of the median step times, by the wall clock and
by this process' own CPU time (which other jobs on the machine disturb less), what a sampled step costs, and what the
labels in the layers cost, which cannot be taken out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

try:
    from launcher.common import prepare_environment, quiet_libraries
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from launcher.common import prepare_environment, quiet_libraries

prepare_environment()

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


class RandomTokens:
    """In the place of a corpus."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._vocabulary, self._length = vocabulary, length

    def batch(self, first: int, size: int) -> Any:
        return np.random.default_rng(first).integers(0, self._vocabulary, (size, self._length + 1))


class NoTiming:
    """The clocks taken out."""

    def phase(self, name: str) -> Any:
        return contextlib.nullcontext()

    def step(self, step: int) -> Any:
        return contextlib.nullcontext()

    def micro_batch(self, step: int, index: int) -> Any:
        return contextlib.nullcontext()

    def add(self, routing: Any) -> None:
        pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of each kind (default: 100)")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    quiet_libraries()
    from s2moe.config import load
    from s2moe.config.run import RunConfig
    from s2moe.training.checkpoint import TrainingState
    from s2moe.training.engine import build_engine
    from s2moe.training.feed import TextFeed
    from s2moe.training.loop import TrainingLoop
    from s2moe.training.processes import start_processes, stop_processes
    from s2moe.training.timing import Timing

    alone = ["training.expert_parallel=1", "training.steps=1000000", *options.overrides]
    config = load(RunConfig, CONFIG, alone)
    model_config = config.model_config(config.model["vocab_size"] or 4096)
    processes = start_processes()
    engine = build_engine(config, model_config, processes)
    with tempfile.TemporaryDirectory() as directory:
        timing = Timing(config, engine.module, processes, Path(directory), print)
        sampler: Any = RandomTokens(model_config.vocab_size, config.training.sequence_length)
        feed = TextFeed(config, processes, sampler)
        unused: Any = None
        loop = TrainingLoop(config, engine, processes, feed, TrainingState(), unused, timing, unused, unused, unused)
        engine.train()
        seconds: dict[str, list[tuple[float, float]]] = {"without": [], "with": [], "sampled": []}
        for number in range(2 * options.steps + 10):
            kind = ("without", "with")[number % 2]
            clocks: Any = timing if kind == "with" else NoTiming()
            seconds[kind].append(one_step(loop, clocks))
            timing.phase.read()
        seconds = {kind: taken[5:] for kind, taken in seconds.items()}
        due = timing._layers.is_due
        for _ in range(6):
            timing._layers.is_due = lambda step: True  # type: ignore[method-assign]
            seconds["sampled"].append(one_step(loop, timing))
            timing._layers.is_due = due  # type: ignore[method-assign]
    stop_processes()
    del seconds["sampled"][0]  # the profiler's first start
    walls, median = (
        {kind: statistics.median(clock[number] for clock in taken) for kind, taken in seconds.items()}
        for number in (0, 1)
    )
    for kind, value in median.items():
        print(
            f"{kind:8} {1e3 * walls[kind]:9.2f} ms a step, {walls[kind] / walls['without']:.4f} x; CPU time "
            f"{1e3 * value:9.2f} ms, {value / median['without']:.4f} x; {len(seconds[kind])} steps"
        )
    extra = (median["sampled"] - median["with"]) / config.profile.layers_every
    print(f"a sample every {config.profile.layers_every} steps: {extra / median['without']:.4%} of the time")
    labels = 3 * model_config.num_hidden_layers * config.accumulation_steps(1)
    print(
        f"labels in the layers: {labels} x {1e6 * label_seconds():.1f} us a step, without expert parallelism: ", end=""
    )
    print(f"{labels * label_seconds() / median['without']:.4%}")


def one_step(loop: Any, timing: Any) -> tuple[float, float]:
    """Seconds of an optimizer step with these clocks: by the wall, and of CPU time."""
    loop.timing = timing
    begin, own = time.perf_counter(), time.process_time()
    with timing.step(loop.state.step + 1):
        loop._step()
    return time.perf_counter() - begin, time.process_time() - own


def label_seconds() -> float:
    """Seconds of a label while no profiler runs."""
    from torch.profiler import record_function

    begin = time.process_time()
    for _ in range(20000):
        with record_function("s2moe::experts"):
            pass
    return (time.process_time() - begin) / 20000


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
