"""Continue a run with other processes: another number of them, expert-parallel degree or ZeRO stage.

A checkpoint's files are cut for the shape that wrote them. One process rewrites the newest one in DeepSpeed's
universal form, one folder a parameter, beside it as `universal-step-00000N`; from there every process of the new
shape takes what is its own. It goes when the run has saved its first checkpoint of the new shape. Like a checkpoint
it is complete or absent, and an interrupted start finds and takes it.

Losses are then those of an uninterrupted run, up to the order of sums, if the global batch is cut into the same
micro-batches: dropout and noise are drawn for each of them by its number. The exception is a balance loss with
balance_scope=global, which counts over the ranks of one micro-batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from s2moe.config import ConfigError
from s2moe.parallel import deepspeed_compat

from .checkpoint import (
    TEMPORARY,
    UNIVERSAL,
    Checkpoint,
    TrainingState,
    open_checkpoint,
    publish,
    shape_of,
    shape_text,
    verify,
)
from .processes import Processes
from .ranks import from_first

POLL_SECONDS = 0.2
STORE_SECONDS = 60.0  # to wait for an answer of the store
SPACE = 2.2  # disk space for a conversion, in sizes of the checkpoint: every number is written twice
CONFIG_FILE = "config.yaml"
_calls = itertools.count()


def in_shape_of(
    checkpoint: Checkpoint,
    current: TrainingState,
    processes: Processes,
    progress: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """The checkpoint in a form that a run of `current`'s shape can load: itself, or its universal form. Collective.

    Args:
        progress: called while the conversion goes on, on every process.

    Raises:
        ConfigError: on every process, if it cannot be converted or the disk is too small.
    """
    if checkpoint.universal or shape_of(checkpoint.state) == shape_of(current):
        return checkpoint
    beside = checkpoint.path.with_name(f"{UNIVERSAL}{checkpoint.path.name}")
    converted = _opened(beside, processes)  # by an interrupted start, or ahead of time
    try:
        if converted is not None:
            verify(converted, progress)
            return converted
    except ConfigError as error:
        if processes.is_main:
            print(f"warning: {error}; converting again", flush=True)
    on_first(processes, lambda goes_on: convert(checkpoint, beside, goes_on), progress)
    converted = _opened(beside, processes)
    if converted is None:
        raise ConfigError(f"{beside} has gone while it was being used")
    return converted


def _opened(path: Path, processes: Processes) -> Checkpoint | None:
    """The checkpoint as process 0 sees it, on all; None where there is no complete one. Collective."""
    found: Checkpoint | None = None
    if processes.is_main:
        with contextlib.suppress(ConfigError):
            found = open_checkpoint(path)
    return from_first(found)


def convert(checkpoint: Checkpoint, target: Path, progress: Callable[[], None] = lambda: None) -> None:
    """Write the universal form of a checkpoint to `target`, complete or not at all. In one process.

    Raises:
        ConfigError: the disk is too small, or the checkpoint's files are not what they should be.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        require_space(checkpoint, temporary)
        deepspeed_compat.to_universal(checkpoint.path, temporary, progress)
        publish(temporary, target, checkpoint.state, {}, universal=True)
    except ConfigError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except deepspeed_compat.CheckpointFileError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(str(error)) from error
    except Exception as error:  # a full disk, or DeepSpeed's assertions about what it reads
        shutil.rmtree(temporary, ignore_errors=True)
        told = f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot convert {checkpoint.path}: {told}. {_remedy(checkpoint)}") from error


def require_space(checkpoint: Checkpoint, folder: Path) -> None:
    """Raise ConfigError if the disk of `folder` has too little room to convert the checkpoint."""
    needed, free = SPACE * sum(checkpoint.sizes.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"converting {checkpoint.path} for another number or division of processes needs about "
            f"{_size(needed)} on the disk of {folder.parent} for a while, and {_size(free)} are free. "
            + _remedy(checkpoint)
        )


def _remedy(checkpoint: Checkpoint) -> str:
    return f"Make room, or continue as it was written: {shape_text(checkpoint.state)}"


def _size(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e8 else f"{number / 1e6:.3g} MB"


def reshape(source: Checkpoint, target: Path | None) -> Path:
    """Convert a checkpoint ahead of time, in this one process: for the next start of its run, or as a run of its own.

    Args:
        source: a checkpoint of a run.
        target: directory of the new run, which holds nothing yet; None: beside the checkpoint.

    Returns:
        The universal checkpoint.

    Raises:
        ConfigError: there is nothing to convert, or `target` holds something.
    """
    if source.universal:
        raise ConfigError(f"{source.path} is universal already: it can be continued in every shape")
    if target is None:
        place = source.path.with_name(f"{UNIVERSAL}{source.path.name}")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty: give another --out")
    else:
        place = target / "checkpoints" / source.path.name
    convert(source, place)
    settings = source.path.parent.parent / CONFIG_FILE
    if target is not None and settings.is_file():
        shutil.copy(settings, target)
    return place


# --- one process works, the others wait ------------------------------------------------------------------


def on_first(
    processes: Processes, work: Callable[[Callable[[], None]], None], progress: Callable[[], None] = lambda: None
) -> None:
    """Do `work` on process 0 while the others wait as long as it goes on. Collective.

    No collective is waited in, whose timeout would end the run. `work` is given a function to call when it has come a
    little further; `progress` is then called on every process, so that their watchdogs notice if it has not.

    Raises:
        ConfigError: on every process, if `work` raised one.
    """
    if processes.world_size == 1:
        work(progress)
        return
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()  # a connection of our own: a watchdog uses the other one
    store.set_timeout(timedelta(seconds=STORE_SECONDS))
    key = f"s2moe/on_first/{next(_calls)}"
    if processes.is_main:
        _report(store, key, work, progress)
    else:
        _follow(store, key, progress)


def _report(store: Any, key: str, work: Callable[[Callable[[], None]], None], progress: Callable[[], None]) -> None:
    last = time.monotonic()

    def goes_on() -> None:
        nonlocal last
        progress()
        if time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            store.add(f"{key}/steps", 1)

    problem = None
    try:
        work(goes_on)
    except ConfigError as error:
        problem = str(error)
        raise
    except BaseException as error:
        problem = f"rank 0: {type(error).__name__}: {error}"
        raise
    finally:
        store.set(f"{key}/end", json.dumps(problem))


def _follow(store: Any, key: str, progress: Callable[[], None]) -> None:
    steps = 0
    while not store.check([f"{key}/end"]):
        time.sleep(POLL_SECONDS)
        now = store.add(f"{key}/steps", 0)
        if now != steps:
            steps = now
            progress()
    problem = json.loads(store.get(f"{key}/end"))
    if problem is not None:
        raise ConfigError(problem)
