#!/usr/bin/env python
"""Train a vision model: a classic mixture of experts, SNNL-MoE, V-MoE, SMoE-VAE.

    python launcher/train_vision.py --config configs/vision/digits_quick.yaml         one process; needs no network
    deepspeed launcher/train_vision.py --config configs/vision/...                     all GPUs of this machine
    deepspeed --num_accelerators 2 launcher/train_vision.py --config ...               2 processes, also on the CPU
    torchrun --standalone --nproc-per-node 2 launcher/train_vision.py --config ...

Settings come from the YAML file and, on top of it, from section.key=value arguments:

    ... --config configs/vision/mnist_attentive.yaml data.source=~/mnist seed=2 name=second
    ... --config ... model.kind=mixture model.gate=attentive                          another model
    ... --config ... training.epochs=1 optimizer.lr=3e-4

A run writes output_dir/name: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and, when it is finished,
evaluation.json and hf/. Started again with the same command, it continues from its newest complete checkpoint. A
directory that something else made (another kind of run, another run, you) is refused with nothing touched; a finished
run of which no checkpoint is left says that it is finished.

--dry-run opens the images, prints parameters and steps, and trains nothing. --list-sets and --list-kinds say which
images and models there are.

All rows of a published table, each with several seeds, beside the published figures:

    python launcher/train_vision.py --table mnist --source ~/mnist --jobs 2           10 runs a row, as published
    python launcher/train_vision.py --table mnist --runs 3 --rows vanilla,attentive --epochs 5
    python launcher/train_vision.py --list-tables

It writes runs/tables/<table>: results.csv, table.md and figures. Every run is a directory of its own: started again
with the same command, finished runs are kept and unfinished ones go on. Settings after the options go to every run.

What a finished run has become, beyond its evaluation.json, in one process and on the same test images:

    python launcher/train_vision.py --report runs/digits_quick
    python launcher/train_vision.py --report RUN --source ~/mnist                      the images lie elsewhere now
    python launcher/train_vision.py --report RUN --samples 1000 --corrupt-seed 1       a trial; other noise

It writes RUN/report: report.md, report.json and pictures. Every classifier: accuracy under noise, blur, contrast and
occlusion at five severities. mixture and snnl_moe: how alike experts are in weights and outputs, which one serves which
class. vmoe: accuracy against compute, for many capacities, experts per token and priorities. vae: active experts, error
by expert, probes, reconstructions.

SIGTERM and SIGUSR1, to any process of a run, Ctrl-C and a closed terminal save a checkpoint at the end of the step
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
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # importing takes a while: a request to stop waits for s2moe.training.signals
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

if TYPE_CHECKING:
    from s2moe.config.vision import VisionRunConfig

try:
    from launcher.common import fail, prepare_environment, run, run_parser, train_and_report
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import fail, prepare_environment, run, run_parser, train_and_report

prepare_environment()

EXAMPLE = "configs/vision/digits_quick.yaml"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what is not an option is a setting."""
    parser = run_parser()
    for name in ("sets", "kinds", "tables"):
        parser.add_argument(f"--list-{name}", action="store_true")
    table = parser.add_argument_group("tables")
    table.add_argument("--table")
    table.add_argument("--runs", type=int, help="runs a row; default: as many as published")
    table.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    table.add_argument("--rows", help="only these rows, separated by commas")
    table.add_argument("--epochs", type=float, help="of every stage, instead of the published number")
    table.add_argument("--source", help="a local copy of the images")
    table.add_argument("--output", default="runs/tables", help="where the table's directory is made")
    report = parser.add_argument_group("report on a finished run")
    report.add_argument("--report", type=Path, metavar="RUN", help="its directory")
    report.add_argument("--corrupt-seed", type=int, help="of noise and of places of occlusion; default: 0")
    report.add_argument("--samples", type=int, help="so many test images, drawn by chance; default: all")
    parser.needs("table", "runs", "jobs", "rows", "epochs", "output")
    parser.needs("table or report", "source")
    parser.needs("report", "corrupt_seed", "samples")
    options = parser.parse_intermixed_args(arguments)
    if options.source is not None and any(text.startswith("data.source=") for text in options.overrides):
        parser.error("--source and data.source=... say the same: give one of them")
    if options.report is not None and (options.table is not None or options.config is not None):
        parser.error("--report goes without --config and --table: a run has its own settings")
    if options.report is not None and (options.overrides or options.dry_run):
        what = "--dry-run" if options.dry_run else options.overrides[0]
        parser.error(f"--report takes no {what}: it looks at the run as it is")
    if options.table is not None and options.config is not None:
        parser.error("--table and --config exclude one another: a table has its own settings")
    return options


def main(arguments: list[str]) -> None:
    """Read the settings, then explain, plan or train."""
    options = parse(arguments)
    if options.help:
        from s2moe.config.help import help_text
        from s2moe.config.vision import VisionRunConfig, explain_kinds

        print(f"{__doc__}\n{help_text(VisionRunConfig)}{explain_kinds()}")
    elif options.list_sets:
        from s2moe.data.images import IMAGE_SETS

        print("\n".join(f"{name:20} {known.summary}" for name, known in IMAGE_SETS.items()))
    elif options.list_kinds:
        from s2moe.models.vision import VISION_KINDS

        print("\n".join(f"{name:20} {kind.summary}" for name, kind in VISION_KINDS.items()))
    elif options.list_tables:
        from s2moe.training.tables import list_tables

        print(list_tables())
    elif options.table is not None:
        make_table(options)
    elif options.report is not None:
        make_report(options)
    elif options.config is None:
        fail(f"error: --config is missing; for example --config {EXAMPLE}, or --table mnist (--help explains)", 2)
    else:
        from s2moe.config import load
        from s2moe.config.vision import VisionRunConfig

        config = load(VisionRunConfig, options.config, options.overrides)
        if options.dry_run:
            dry_run(config)
        else:
            train(config)


def dry_run(config: VisionRunConfig) -> None:
    """Print what the run would be."""
    from s2moe.training.environment import number
    from s2moe.training.vision_report import plan

    if number(os.environ, "RANK", 0) == 0:
        print(plan(config))


def train(config: VisionRunConfig) -> None:
    """Train, then report."""
    from s2moe.training.vision import train_vision
    from s2moe.training.vision_report import report

    train_and_report(config, config.data.open, train_vision, report)


def make_report(options: argparse.Namespace) -> None:
    """Report on a finished run."""
    from s2moe.training.details import REPORT_TEXT, report_on
    from s2moe.training.environment import number

    if number(os.environ, "WORLD_SIZE", 1) > 1:
        fail("error: --report runs in one process: start it with python", 2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
    directory = report_on(options.report, options.source, options.corrupt_seed or 0, options.samples)
    print((directory / REPORT_TEXT).read_text(encoding="utf-8"))
    print(f"report: {directory}")


def make_table(options: argparse.Namespace) -> None:
    """Train all rows of a table that are not finished, and write it."""
    from s2moe.training.tables import run_table

    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
    run_table(
        options.table,
        runs=options.runs,
        jobs=options.jobs,
        rows=[row.strip() for row in options.rows.split(",")] if options.rows else None,
        epochs=options.epochs,
        source=options.source,
        output=options.output,
        overrides=options.overrides,
        dry_run=options.dry_run,
    )


if __name__ == "__main__":
    run(main)
