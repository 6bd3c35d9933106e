"""How a run ends before its time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from s2moe.config.options import ConfigError
from s2moe.data import CorpusError
from s2moe.disk import disk_is_full, told_of_disk

if TYPE_CHECKING:
    from .watchdog import Watchdog

LOST = 4  # exit status of a process that lost another one, or waited too long


class ProcessError(ConfigError):
    """A setting that is impossible for this process, though perhaps not for the others: each says so itself."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names step, place and cause, and what to do; no traceback is needed."""


class LostProcessError(TrainingError):
    """Another process is gone, or does not go on. Started again, the run continues."""


def remains(saved: int | None) -> str:
    """For the user: from where the same command goes on, if the newest complete checkpoint is that of step `saved`."""
    if saved is None:
        return "there is no checkpoint yet: the same command begins anew"
    return f"the checkpoint of step {saved} is intact: the same command continues from there"


@contextlib.contextmanager
def ending_on_full_disk(watchdog: Watchdog) -> Iterator[None]:
    """Within it, a file that cannot be written for want of room is a TrainingError; checkpoints say so themselves."""
    try:
        yield
    except (ConfigError, CorpusError, TrainingError):
        raise
    except Exception as error:
        if not disk_is_full(error):
            raise
        step, told = watchdog.state.step, told_of_disk(error)
        raise TrainingError(f"stopped after step {step}: {told}: make room; {watchdog.remains()}") from error
