#!/usr/bin/env python
"""What saving a checkpoint costs: as it is, without checksums, and behind training; and what checking one costs.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --repeat 10 model.hidden_size=512 model.moe.num_experts=32

Settings on top of configs/quickstart.yaml. The kinds take turns in one process, in a directory beside this
repository's runs (or --directory), and their medians are printed as ratios of a plain save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

try:
    from launcher.common import prepare_environment, quiet_libraries
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from launcher.common import prepare_environment, quiet_libraries

prepare_environment()

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="saves of each kind (default: 5)")
    parser.add_argument("--directory", type=Path, help="on the file system to measure (default: the temporary one)")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    quiet_libraries()
    from s2moe.config import load
    from s2moe.config.run import RunConfig
    from s2moe.training import writing
    from s2moe.training.checkpoint import Saver, TrainingState, open_checkpoint, verify
    from s2moe.training.engine import build_engine
    from s2moe.training.processes import start_processes, stop_processes

    config = load(RunConfig, CONFIG, ["training.expert_parallel=1", *options.overrides])
    processes = start_processes()
    engine = build_engine(config, config.model_config(config.model["vocab_size"] or 4096), processes)
    seconds: dict[str, list[float]] = {"plain": [], "with checksums": [], "behind training": [], "checking": []}
    size = 0
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        savers = {behind: Saver(engine, Path(folder), 1, behind) for behind in (False, True)}

        def save(kind: str) -> None:
            saver = savers[kind == "behind training"]
            begin = time.monotonic()
            saver.save(TrainingState(step=len(seconds[kind]) + 1))
            seconds[kind].append(time.monotonic() - begin)
            saver.settle(wait=True)

        def without_checksums() -> None:
            none = SimpleNamespace(update=lambda piece: None, hexdigest=lambda: "")
            with mock.patch.object(writing, "sha256", return_value=none):
                save("plain")

        def and_check() -> None:
            nonlocal size
            save("with checksums")
            saved = open_checkpoint(Path(folder) / f"step-{len(seconds['with checksums']):08}")
            size = sum(saved.sizes.values())
            begin = time.monotonic()
            verify(saved)
            seconds["checking"].append(time.monotonic() - begin)

        turns = [without_checksums, lambda: save("behind training"), and_check]
        for number in range(options.repeat + 1):
            for turn in range(3):  # none always comes after the same other
                turns[(number * (1 + number % 2) + turn * (1 + number % 2)) % 3]()
    stop_processes()
    median = {kind: statistics.median(taken[1:]) for kind, taken in seconds.items()}
    print(f"{size / 1e6:.0f} MB a checkpoint, {options.repeat} of each kind")
    for kind, value in median.items():
        print(f"{kind:16} {value:8.3f} s {value / median['plain']:8.2f} x")


if __name__ == "__main__":
    main()
