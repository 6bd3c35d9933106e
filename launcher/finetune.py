#!/usr/bin/env python
"""Fine-tune a pre-trained model on a classification task: SST-2, SST-5, IMDB, BANKING77, or texts of your own.

    deepspeed launcher/finetune.py --config configs/finetune/sst2.yaml \\
        model.checkpoint=runs/quickstart data.input_length=128
    deepspeed --num_accelerators 2 launcher/finetune.py --config ...       2 processes, also on the CPU
    python launcher/finetune.py --config ...                               one process
    torchrun --standalone --nproc-per-node 2 launcher/finetune.py --config ...
    srun --ntasks-per-node 8 python launcher/finetune.py --config ...      inside a Slurm job

data.input_length, the most tokens of a text, can be no more than the model was pre-trained on: 128 by
configs/quickstart.yaml, 512 by configs/enwik8/.

The task's official files are downloaded to data/; a local copy is taken with data.source=PATH. Files of your own,
train.csv and, if you have them, validation.csv and test.csv, with the columns text and label (or .tsv, .jsonl):

    ... --config configs/finetune/own.yaml data.source=reviews name=reviews model.checkpoint=runs/...
    ... data.source=reviews.csv data.text_column=review data.label_column=stars      one file: a part is held out

Settings come from the YAML file and, on top of it, from section.key=value arguments:

    ... model.checkpoint=runs/xmoe model.freeze=routers_and_experts model.balance_loss=null    X-MoE's recipe
    ... model.noise=false                                       S2MoE without its noise while fine-tuning
    ... optimizer.factors.layer_decay=0.9 optimizer.factors.head=5          learning rates by depth
    ... data.max_texts=500 training.epochs=1 name=trial         a quick look

--dry-run checks settings, texts, weights and the run's directory, prints texts, parameters and steps, and writes
nothing: files of the task that are not there yet are not downloaded. WORLD_SIZE says for how many processes.

A run writes output_dir/name: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ after every epoch and, when it is
finished, results.json with the test accuracy of the epoch that was best on the validation split, and hf/ with its
model. Started again with the same command, it continues from its newest complete checkpoint; a finished run says that
it is, and is not trained again. A directory that something else made, another kind of run for instance, is refused
with nothing touched.

SIGTERM, SIGUSR1, Ctrl-C and a closed terminal save a checkpoint at the end of the step and stop the run. A second
Ctrl-C ends it at once.

Exit status: 0 finished, 2 a setting or the data is wrong, 3 the loss was not finite, or a disk is full, 75 stopped by a
signal: to be started again, 130 a second Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if __name__ == "__main__":  # importing takes a while: a request to stop waits for s2moe.training.signals
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

if TYPE_CHECKING:
    from s2moe.config.finetune import FinetuneConfig

try:
    from launcher.common import fail, leave, prepare_environment, run, run_parser
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import fail, leave, prepare_environment, run, run_parser

prepare_environment()


def main(arguments: list[str]) -> None:
    """Read the settings, then explain or fine-tune, and report."""
    options = run_parser().parse_intermixed_args(arguments)
    from s2moe.config import load
    from s2moe.config.finetune import FinetuneConfig

    if options.help:
        from s2moe.config.help import help_text

        print(f"{__doc__}\n{help_text(FinetuneConfig)}")
        return
    if options.config is None:
        fail("error: --config is missing; for example --config configs/finetune/sst2.yaml (--help explains)", 2)
    config = load(FinetuneConfig, options.config, options.overrides)
    if options.dry_run:
        dry_run(config)
    else:
        train(config)


def dry_run(config: FinetuneConfig) -> None:
    """Print what the run would do on `WORLD_SIZE` processes (default: one copy of the experts)."""
    from s2moe.finetuning.plan import plan
    from s2moe.training.environment import number

    if number(os.environ, "RANK", 0) == 0:
        print(plan(config, number(os.environ, "WORLD_SIZE", config.training.expert_parallel, least=1)))


def train(config: FinetuneConfig) -> None:
    """Fine-tune, and report."""
    from s2moe.finetuning.run import finetune
    from s2moe.output import output_is_spare
    from s2moe.training.processes import start_processes, stop_processes
    from s2moe.training.run_directory import finished_text
    from s2moe.training.signals import STOPPED, catch_stop_signals

    catch_stop_signals()
    output_is_spare()
    processes = start_processes(config.training.timeout_minutes)
    result = finetune(config, processes)
    stop_processes(together=not result.results)
    if not result.results:
        if processes.is_main:
            print(f"stopped by a signal after step {result.step}; the same command continues")
        leave(STOPPED)
    if processes.is_main:
        values = result.results
        if result.finished_before:
            print(finished_text(result.directory, f"after {result.step:,} steps"))
        print(
            f"\n{values['task']}: test accuracy {100 * values['test_accuracy']:.2f} % "
            f"({values['texts']['test']:,} texts), at the best validation accuracy, "
            f"{100 * values['validation_accuracy']:.2f} % after step {values['best_step']}"
        )
        print("\n".join(f"  {note}" for note in values["notes"]))
        print(f"run directory: {result.directory}", flush=True)


if __name__ == "__main__":
    run(main)
