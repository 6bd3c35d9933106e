"""Whole pre-training runs on the ranks of a test, with ways to kill them at a chosen moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.training import checkpoint, writing
from s2moe.training.processes import Processes
from s2moe.training.run import pretrain

RUN = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.hidden_dropout": 0.1,
    "model.moe.num_experts": 4,
    "model.moe.expert_hidden": 32,
    "model.moe.router.bias_update_rate": 0.01,
    "training.steps": 12,
    "training.global_batch": 8,
    "training.micro_batch": 2,
    "training.sequence_length": 32,
    "training.expert_parallel": 2,
    "optimizer.lr": 0.01,
    "schedule.warmup_steps": 3,
    "evaluation.every": 6,
    "evaluation.context": 16,
    "evaluation.segment": 16,
    "checkpoint.every": 3,
    "logging.every": 1,
    "logging.tensorboard": False,
    "logging.sample_tokens": 0,
}


def die() -> None:
    """End this rank as a power cut would: no cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def killing(target: Any, name: str, call: int, after: bool) -> Any:
    """Patch ``target.name`` so that this rank dies before or after the given call of it (from 1)."""
    original: Callable[..., Any] = getattr(target, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            die()
        result = original(*args, **kwargs)
        if calls == call and after:
            die()
        return result

    return mock.patch.object(target, name, counted)


PLACES = {
    "torch.save": (torch, "save"),
    "engine files synced": (writing, "sync"),
    "manifest": (checkpoint, "_write_manifest"),
    "rename": (os, "rename"),
    "old one removed": (checkpoint, "remove"),
}


def run(
    corpus: str, output: str, settings: dict[str, Any], death: tuple[str, int, bool] | float | None, victim: int
) -> dict[str, Any]:
    """``pretrain`` with RUN and ``settings``; rank ``victim`` dies at the given place or after so many seconds."""
    overrides = {"name": "run", "data.dir": corpus, "output_dir": output, **RUN, **settings}
    config = load(RunConfig, None, [f"{key}={value}" for key, value in overrides.items()])
    rank, world = dist.get_rank(), dist.get_world_size()
    processes = Processes(rank, rank, world, torch.device("cpu"))
    if death is not None and rank == victim:
        if isinstance(death, float):
            threading.Timer(death, die).start()
        else:
            place, call, after = death
            with killing(*PLACES[place], call, after):
                return outcome(pretrain(config, processes))
    return outcome(pretrain(config, processes))


def run_until_the_disk_is_full(corpus: str, output: str, settings: dict[str, Any]) -> None:
    """``run``, where rank 1 cannot bring the files of the checkpoint of step 6 to the disk."""
    original = writing.sync

    def sync(path: Path) -> None:
        if dist.get_rank() == 1 and "step-6" in str(path):
            raise OSError(28, os.strerror(28))
        original(path)

    with mock.patch.object(writing, "sync", sync):
        run(corpus, output, settings, None, 0)


def outcome(result: Any) -> dict[str, Any]:
    """The figures of a finished run."""
    return {
        "finished": result.finished,
        "step": result.state.step,
        "bpc": result.score.bits_per_symbol if result.score else None,
        "hf": str(result.hf) if result.hf else None,
    }


def checkpoints_of(output: Path) -> list[str]:
    """Names of the complete checkpoints of the run."""
    return [found.path.name for found in checkpoint.list_complete(output / "run" / "checkpoints")]
