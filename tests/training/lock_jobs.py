"""What ranks do in the tests of a run's directory: each may see another one, or hold its lock."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from s2moe.config import ConfigError, load
from s2moe.config.run import RunConfig
from s2moe.training import publication
from s2moe.training.checkpoint import TrainingState, save
from s2moe.training.errors import TrainingError
from s2moe.training.processes import Processes
from s2moe.training.run import pretrain
from s2moe.training.run_lock import locked
from tests.distributed.run_jobs import RUN

ALONE = Processes(0, 0, 1, torch.device("cpu"))


def hold(directory: Path, wait: float = 120.0) -> None:
    """Hold the lock of a run for a while, as a process of its own."""
    with locked(directory, ALONE):
        time.sleep(wait)


def enter(folder: str, apart: bool) -> None:
    """Work in `folder`, or each rank in a folder of its own there: a disk of its own machine."""
    place = Path(folder, f"machine{dist.get_rank()}" if apart else "machine0")
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)


def run_apart(corpus: str, folder: str, apart: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """``pretrain`` into a relative directory; the step, or the error that it ends with."""
    enter(folder, apart)
    overrides = {"name": "run", "data.dir": corpus, "output_dir": "runs", **RUN, **settings}
    config = load(RunConfig, None, [f"{key}={value}" for key, value in overrides.items()])
    processes = Processes(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    try:
        return {"step": pretrain(config, processes).state.step}
    except (ConfigError, TrainingError) as error:
        return {"error": str(error)}


class OwnFile:
    """Stands for an engine: every rank writes one file."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = SimpleNamespace()

    def save_checkpoint(self, directory: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        path = Path(directory, tag)
        path.mkdir(parents=True, exist_ok=True)
        self.checkpoint_engine.save(b"weights", str(path / f"rank_{dist.get_rank()}.pt"))


def save_twice(folder: str) -> str:
    """Save a step where both ranks see it, and the next one where they do not; the error of that."""
    publication.SEEN_SECONDS = 0.5
    enter(folder, apart=False)
    save(OwnFile(), Path("checkpoints"), TrainingState(step=1), keep=1)
    enter(folder, apart=True)
    try:
        save(OwnFile(), Path("checkpoints"), TrainingState(step=2), keep=1, saved=1)
    except TrainingError as error:
        return str(error)
    return "saved"
