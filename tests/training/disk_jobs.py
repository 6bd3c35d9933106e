"""Runs on a full disk, on the ranks of a test."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from typing import Any

from s2moe.training.loop import TrainingLoop

from . import jobs

SMALL = 30_000  # bytes: more than the logs of a tiny run, less than its weights


@contextlib.contextmanager
def full_disk(size: int = SMALL) -> Iterator[None]:
    """Within it, no file of this process can be longer than `size` bytes: a full disk for those that are."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train_until_full(config_path: str, overrides: list[str], step: int, size: int) -> dict[str, Any]:
    """``train``; from `step` on no file can be longer than `size`."""
    original, stack = TrainingLoop._step, contextlib.ExitStack()

    def limited(self: TrainingLoop) -> bool:
        if self.state.step == step:
            stack.enter_context(full_disk(size))
        return original(self)

    TrainingLoop._step = limited  # type: ignore[method-assign]
    with stack:
        return jobs.train(config_path, overrides)
