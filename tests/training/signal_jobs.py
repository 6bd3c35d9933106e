"""Runs in which a rank is asked to stop at a chosen moment, as functions for the ranks of a test."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.training import language
from s2moe.training import run as run_module
from s2moe.training.checkpoint import list_complete
from s2moe.training.loop import TrainingLoop
from s2moe.training.processes import start_processes
from s2moe.training.signals import catch_stop_signals, stop_signal

PLACES = {
    "a step": (TrainingLoop, "_forward"),
    "a validation": (language, "evaluate"),
    "a checkpoint": (torch, "save"),
}


def stopped(config_path: str, overrides: list[str], place: str, call: int, victim: int) -> dict[str, Any]:
    """Train; at the given call of something (from 1) rank `victim` gets USR1, and TERM after it."""
    config = load(RunConfig, config_path, overrides)
    catch_stop_signals()
    processes = start_processes()
    target, name = PLACES[place]
    original, calls = getattr(target, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and processes.rank == victim:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with mock.patch.object(target, name, counted):
        result = run_module.pretrain(config, processes)
    return {
        "finished": result.finished,
        "signalled": result.signalled,
        "step": result.state.step,
        "saved": [found.state.step for found in list_complete(Path(config.directory) / "checkpoints")],
        "received": stop_signal(),
    }


def killed_in_validation(config_path: str, overrides: list[str], call: int) -> list[int]:
    """Train until the given validation (from 1), which ends the run; the steps of its checkpoints."""
    config = load(RunConfig, config_path, overrides)
    processes = start_processes()
    original, calls = language.evaluate, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise SystemExit
        return original(*args, **kwargs)

    with mock.patch.object(language, "evaluate", counted), contextlib.suppress(SystemExit):
        run_module.pretrain(config, processes)
    return [found.state.step for found in list_complete(Path(config.directory) / "checkpoints")]
