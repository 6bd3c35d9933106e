"""The directory that runs write to: whether all processes share it, how fast it is, how much fits."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .finding import Finding, judge, measured

BLOCK = 2**20
WRITTEN = 64 * BLOCK  # by every process at once, as a checkpoint is
SLOW_MB, FREE_GIB = 50.0, 20.0
SEEN_WITHIN = 10.0  # seconds in which a network file system must show a new file


def check_storage(directory: Path, rank: int, needed: float | None = None, written: int = WRITTEN) -> list[Finding]:
    """Checks `directory`, made if missing; what is written or made is removed again. Collective.

    Args:
        needed: bytes that a run's checkpoints take.
    """
    missing = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    findings = _examine(directory, rank, needed, written)
    if dist.is_initialized():
        dist.barrier()  # the others have removed their files too
    for path in missing:
        with contextlib.suppress(OSError):  # gone, not empty, or never made
            path.rmdir()
    return findings


def _examine(directory: Path, rank: int, needed: float | None, written: int) -> list[Finding]:
    failure = _make(directory)
    seen = _seen_by_all(directory, rank)
    try:
        if failure is not None:
            raise failure
        speed = _write_speed(directory / f".doctor-{os.getpid()}-{rank}", written)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        remedy = "choose a directory that exists and is yours on every machine: --output, output_dir=..."
        return [Finding("output directory", "fail", f"cannot write {directory}: {error.strerror}", remedy)]
    wanted = max(FREE_GIB * 2**30, needed or 0.0)
    enough = free >= (needed or 0.0)
    why = f"checkpoints need {needed / 2**30:,.1f} GiB" if needed else "checkpoints and logs need room"
    return [
        judge(
            "output directory",
            seen,
            str(directory.resolve()),
            "the first process' files do not appear here: checkpoints need a directory that all machines share",
        ),
        measured(
            "disk speed",
            speed / 1e6,
            "MB/s a process",
            "ok" if speed / 1e6 >= SLOW_MB else "warn",
            "checkpoints will take long: use a parallel file system, or raise checkpoint.every",
        ),
        measured(
            "disk space",
            free / 2**30,
            "GiB free",
            "ok" if free >= wanted else ("warn" if enough else "fail"),
            f"{why}: make room, lower checkpoint.keep, or choose another directory",
        ),
    ]


def _make(directory: Path) -> OSError | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error
    return None


def _seen_by_all(directory: Path, rank: int) -> bool:
    """Whether this process sees what the first one writes; True where that one cannot, which it says itself."""
    if not dist.is_initialized():
        return True
    answer: list[Any] = [None]
    mark = directory / f".doctor-{os.getpid()}-mark"
    if rank == 0:
        with contextlib.suppress(OSError):
            mark.write_text("seen", encoding="utf-8")
            answer = [mark.name]
    dist.broadcast_object_list(answer)
    seen = answer[0] is None or _appears(directory / answer[0])
    dist.barrier()
    if rank == 0:
        with contextlib.suppress(OSError):
            mark.unlink()
    return seen


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _write_speed(path: Path, size: int) -> float:
    """Bytes per second to the disk, not to its cache."""
    block = os.urandom(BLOCK)
    begin = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(size // BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - begin)
    finally:
        path.unlink(missing_ok=True)
