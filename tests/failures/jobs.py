"""Pre-training runs that something happens to, on the ranks of a test."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s2moe.config import ConfigError, load
from s2moe.config.run import RunConfig
from s2moe.data import CorpusError
from s2moe.data import corpus as corpora
from s2moe.training import run as training_run
from s2moe.training.loop import TrainingLoop
from s2moe.training.processes import Processes
from tests.distributed.run_jobs import RUN, outcome

SETTINGS = {
    **RUN,
    "training.steps": 6,
    "evaluation.every": 0,
    "checkpoint.every": 2,
}
TIMEOUT_MINUTES = 0.2  # where a fault happens; the time that it takes to find out
FOREVER = 600.0


@dataclass(frozen=True)
class Fault:
    """What happens on `rank`, in the forward pass of `step` (from 1) unless `kind` says otherwise.

    signal_N: the process gets that signal. sleep: it goes on no more. all_to_all: the exchange of rows does not
    return. cut, remove, rewrite: of the training data's file, while all wait. unreadable: that file, for the rank.
    bias, weight, expert: one number of that kind of tensor changes before the checkpoint after the step. position:
    the same with the count of samples. settings: the rank has another learning rate. data: the rank has no corpus.
    """

    kind: str
    rank: int = 1
    step: int = 4


def run(corpus: str, output: str, settings: dict[str, Any], fault: Fault | None) -> dict[str, Any]:
    """``pretrain`` with SETTINGS and ``settings`` while `fault` happens; figures, or the error that it ends with."""
    rank, world = dist.get_rank(), dist.get_world_size()
    overrides = {"name": "run", "data.dir": corpus, "output_dir": output, **SETTINGS, **settings}
    overrides["training.timeout_minutes"] = 5 if fault is None else TIMEOUT_MINUTES
    if fault is not None and fault.kind in DATA:
        act(fault.step, lambda: change_data(fault, Path(corpus)))
    elif fault is not None and fault.rank == rank:
        if fault.kind == "settings":
            overrides["optimizer.lr"] = 0.02
        elif fault.kind == "data":
            overrides["data.dir"] = f"{corpus}-absent"
        else:
            prepare(fault)
    config = load(RunConfig, None, [f"{key}={value}" for key, value in overrides.items()])
    processes = Processes(rank, rank, world, torch.device("cpu"))
    try:
        return outcome(training_run.pretrain(config, processes))
    except (ConfigError, CorpusError) as error:
        return {"error": str(error)}


def prepare(fault: Fault) -> None:
    """Make the fault happen in time."""
    if fault.kind in ("bias", "weight", "expert", "position"):
        before_checking(fault)
        return
    actions: dict[str, Callable[[], None]] = {
        "sleep": lambda: time.sleep(FOREVER),
        "all_to_all": hang_exchange,
        "unreadable": make_unreadable,
    }
    number = fault.kind.removeprefix("signal_")
    act(fault.step, actions.get(fault.kind) or (lambda: os.kill(os.getpid(), int(number))))


def act(step: int, action: Callable[[], None]) -> None:
    """Let this rank do it once, before its first forward pass of `step`."""
    original, happened = TrainingLoop._forward, []

    def forward(self: TrainingLoop, index: int) -> Any:
        if self.state.step == step - 1 and not happened:
            happened.append(True)
            action()
        return original(self, index)

    TrainingLoop._forward = forward  # type: ignore[method-assign]


def hang_exchange() -> None:
    """From now on this rank's exchanges of rows do not return."""
    dist.all_to_all_single = lambda *_, **__: time.sleep(FOREVER)


def make_unreadable() -> None:
    """From now on the data's files are not there for this rank."""

    def status(_: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    corpora._signature = status  # type: ignore[assignment]


def change_data(fault: Fault, corpus: Path) -> None:
    """The rank does it while the others wait, so that all see it in the same step."""
    if dist.get_rank() == fault.rank:
        DATA[fault.kind](corpus / "train.bin")
    dist.barrier()


def rewrite(path: Path) -> None:
    """Other content of the same length, in place."""
    path.write_bytes(b"a" * path.stat().st_size)


DATA: dict[str, Callable[[Path], None]] = {
    "cut": lambda path: os.truncate(path, 100),
    "remove": Path.unlink,
    "rewrite": rewrite,
}


def before_checking(fault: Fault) -> None:
    """Change one number on this rank just before the processes compare theirs."""
    original = training_run.require_equal_replicas

    def check(module: torch.nn.Module, state: Any, *rest: Any) -> None:
        if state.step == fault.step:
            tensors = {
                "bias": module.model.layers[0].moe.router.bias_E,
                "weight": module.model.layers[1].attention.q_proj.weight,
                "expert": module.model.layers[1].moe.experts.w1,
            }
            if fault.kind == "position":
                state.samples += 1
            else:
                with torch.no_grad():
                    tensors[fault.kind].view(-1)[3] += 1e-6
        original(module, state, *rest)

    training_run.require_equal_replicas = check


SIGNALS = {name: f"signal_{int(getattr(signal, name))}" for name in ("SIGKILL", "SIGTERM", "SIGSTOP", "SIGSEGV")}
