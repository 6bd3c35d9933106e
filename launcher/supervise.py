#!/usr/bin/env python
"""Pre-train on the GPUs of this machine, and start again from the newest checkpoint when a process is lost.

    python launcher/supervise.py --config configs/enwik8/s2moe_flop_matched.yaml training.steps=20000
    python launcher/supervise.py --processes 2 --config configs/quickstart.yaml          2 processes, also on the CPU
    python launcher/supervise.py --max-restarts 10 --within-minutes 600 --config ...

Everything else is what launcher/pretrain.py takes. A process that is killed, crashes or hangs longer than
training.timeout_minutes ends the others; all start again. A place (GPU) that fails twice in a row is left
out: the run goes on with the largest shape that divides batch and experts (--min-processes bounds it).
A wrong setting, a loss that is not finite or a full disk are not tried again.

Exit status: that of the run (launcher/pretrain.py --help), or 4 when the restarts are used up. Signals are passed
on: SIGTERM, SIGUSR1, Ctrl-C and a closed terminal save a checkpoint and end the run with status 75. One that comes
while no process can save ends it too, and the newest checkpoint stays what it is.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # importing takes a while: a request to stop waits for s2moe.training.supervisor
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

try:
    from launcher.common import Parser, prepare_environment, run
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import Parser, prepare_environment, run

prepare_environment()

PRETRAIN = Path(__file__).resolve().parent / "pretrain.py"
COUNT = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def gpus() -> list[str]:
    """The GPUs that work now, as CUDA_VISIBLE_DEVICES names them. Counted in processes of their own, which can die."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = count([visible])[0]
    named = list(dict.fromkeys(name.strip() for name in (visible or "").split(",") if name.strip()))
    if not named:
        return [str(index) for index in range(number)]
    if number == len(named):
        return named
    return [name for name, works in zip(named, count(named), strict=True) if works]  # CUDA sees none behind a lost one


def count(visible: Sequence[str | None]) -> list[int]:
    """How many GPUs a process finds, for each value of CUDA_VISIBLE_DEVICES (None: unset). All at once."""
    processes = []
    for value in visible:
        environment = os.environ | ({} if value is None else {"CUDA_VISIBLE_DEVICES": value})
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", COUNT],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    printed = [process.communicate()[0].split() for process in processes]
    return [int(words[-1]) if words else 0 for words in printed]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest, which is pretrain's."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--processes", type=int, help="processes to start (default: one for each GPU, or 1)")
    parser.add_argument("--min-processes", type=int, default=1, help="go on with no fewer (default: 1)")
    parser.add_argument("--max-restarts", type=int, default=3, help="restarts within the window (default: 3)")
    parser.add_argument("--within-minutes", type=float, default=60.0, help="the window (default: 60)")
    options, rest = parser.parse_known_args(arguments)
    for name, least in (("processes", 1), ("min_processes", 1), ("max_restarts", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 0 < options.within_minutes < math.inf:
        parser.error(f"--within-minutes must be positive, got {options.within_minutes}")
    return options, rest


def main(arguments: list[str]) -> None:
    """Read the settings once, to know the run's directory and shapes; then start processes until it is done."""
    options, rest = parse(arguments)
    from launcher.pretrain import parse as parse_pretrain
    from s2moe.config import ConfigError, load
    from s2moe.config.run import RunConfig, check_world
    from s2moe.training.checkpoint import find_latest
    from s2moe.training.elastic import Shape, shape_for
    from s2moe.training.supervisor import Supervisor

    found = parse_pretrain(rest)
    if found.config is None:
        raise ConfigError("--config is missing; for example --config configs/quickstart.yaml (--help explains)")
    config = load(RunConfig, found.config, found.overrides)
    present = gpus()
    processes = options.processes or max(1, len(present))
    if present and processes > len(present):
        raise ConfigError(f"--processes: this machine has {len(present)} GPUs, got {processes}")
    check_world(config, processes)
    if options.min_processes > processes:
        raise ConfigError(f"--min-processes: must be at most the {processes} processes, got {options.min_processes}")

    def shape(available: int) -> Shape | None:
        found = shape_for(config, processes, available)
        return found if found is not None and found.processes >= options.min_processes else None

    def progress() -> str:
        latest = find_latest(config.directory / "checkpoints")
        return f"step {latest.state.step}" if latest is not None else "the start"

    supervisor = Supervisor(
        [sys.executable, str(PRETRAIN), *rest],
        processes,
        shape,
        gpus if present else (lambda: None),
        progress,
        options.max_restarts,
        options.within_minutes,
    )
    sys.exit(supervisor.run())


if __name__ == "__main__":
    run(main)
