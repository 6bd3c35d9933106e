"""Code in a forked child of the test, with standard streams of its own: what a command does to its process."""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import s2moe.output


@dataclass(frozen=True)
class Ended:
    """`status` is negative for a signal; what was printed is empty where a stream went elsewhere."""

    status: int
    output: str
    errors: str


def forked(
    action: Callable[[], Any], output: int | None = None, errors: int | None = None, limit: float = 60.0
) -> Ended:
    """Call `action` in a child, as the main program of a command.

    Args:
        output, errors: descriptors of its standard output and error; None: what it writes is returned; -1: closed.
        limit: seconds after which it is ended by SIGALRM.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(
                action, out.fileno() if output is None else output, err.fileno() if errors is None else errors, limit
            )
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return Ended(os.waitstatus_to_exitcode(status), *texts)


def _become(action: Callable[[], Any], output: int, errors: int, limit: float) -> None:
    status = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        for place, given, name in ((1, output, "stdout"), (2, errors, "stderr")):
            if given == -1:
                os.close(place)
                stream = None
            else:
                os.dup2(given, place)
                stream = io.TextIOWrapper(io.FileIO(place, "wb", closefd=False), "utf-8", line_buffering=True)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        s2moe.output._spare, s2moe.output._lost = False, None  # whatever the test's own process has run before
        action()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, AttributeError):
                status = status or 120
        os._exit(status)


def broken_pipe() -> int:
    """A descriptor that nobody reads from."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def full_disk() -> int:
    """A descriptor of a file on a full disk."""
    return os.open("/dev/full", os.O_WRONLY)
