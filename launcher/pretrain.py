#!/usr/bin/env python
"""Pre-train a sparse mixture-of-experts language model.

    deepspeed launcher/pretrain.py --config configs/quickstart.yaml          all GPUs of this machine
    deepspeed --num_accelerators 2 launcher/pretrain.py --config ...         2 processes, also on the CPU
    python launcher/pretrain.py --config ... training.expert_parallel=1      one process
    torchrun --standalone --nproc-per-node 2 launcher/pretrain.py --config ...
    srun --ntasks-per-node 8 python launcher/pretrain.py --config ...        inside a Slurm job

Settings come from the YAML file and, on top of it, from section.key=value arguments:

    ... --config configs/enwik8/s2moe_flop_matched.yaml training.steps=1000 optimizer.lr=1e-3 name=trial
    ... --config ... model.moe.method=smoe model.moe.experts_per_token=2     plain top-2 instead of S2MoE
    ... --config ... model.moe.router.balance_loss=0                         a router's own option

A run writes output_dir/name: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and, when it is
finished, hf/. Started again with the same command, it continues from its newest complete checkpoint. A directory that
something else made (another kind of run, another run, you) is refused with nothing touched; a finished run of which no
checkpoint is left says that it is finished.

What would it cost? --dry-run prints parameters, memory per process and FLOPs and allocates nothing:

    python launcher/pretrain.py --config configs/large_10b.yaml --dry-run --world-size 64

Every published method is one setting, model.moe.method=...; --list-methods says which there are.

SIGTERM and SIGUSR1, to any process of the run, Ctrl-C and a closed terminal save a checkpoint at the end of the step
and stop it. A second Ctrl-C ends it at once.

Exit status: 0 finished (or stopped by training.stop_after_minutes), 2 a setting or the data is wrong,
3 the loss or the gradient was not finite, processes diverged, or a disk is full, 4 another process was lost, or
nothing went on for training.timeout_minutes, 75 stopped by a signal: to be started again, 130 a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING

if __name__ == "__main__":  # importing takes a while: a request to stop waits for s2moe.training.signals
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

if TYPE_CHECKING:
    from s2moe.config.run import RunConfig

try:
    from launcher.common import fail, prepare_environment, run, run_parser, train_and_report
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import fail, prepare_environment, run, run_parser, train_and_report

prepare_environment()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what is not an option is a setting."""
    parser = run_parser()
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--list-methods", action="store_true")
    parser.needs("dry_run", "world_size")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        parser.error(f"--world-size must be at least 1, got {options.world_size}")
    return options


def main(arguments: list[str]) -> None:
    """Read the settings, then explain, plan or train."""
    options = parse(arguments)
    from s2moe.config import load
    from s2moe.config.run import RunConfig

    if options.help:
        from s2moe.config.explain import explain

        print(f"{__doc__}\n{explain()}")
        return
    if options.list_methods:
        from s2moe.config.explain import list_methods

        print(list_methods())
        return
    if options.config is None:
        fail("error: --config is missing; for example --config configs/quickstart.yaml (--help explains)", 2)
    config = load(RunConfig, options.config, options.overrides)
    if options.dry_run:
        dry_run(config, options.world_size)
    else:
        train(config)


def dry_run(config: RunConfig, world_size: int | None) -> None:
    """Print what the run would cost on `world_size` processes (default: one copy of the experts)."""
    from s2moe.config.run import check_world
    from s2moe.training.environment import number
    from s2moe.training.plan import plan, vocabulary

    world_size = world_size or number(os.environ, "WORLD_SIZE", config.training.expert_parallel, least=1)
    check_world(config, world_size)
    symbols, note = vocabulary(config)
    if number(os.environ, "RANK", 0) == 0:
        if note:
            print(note)
        print(plan(config, config.model_config(symbols), world_size))


def train(config: RunConfig) -> None:
    """Train, then report."""
    from s2moe.training.report import report
    from s2moe.training.run import pretrain

    train_and_report(config, lambda: config.data.open().tokenizer, pretrain, report)


if __name__ == "__main__":
    run(main)
