"""What a command prints, where nobody can take it: `| head` that has ended, a closed terminal, a log on a full disk.

Python would raise at the next print, wherever in the program that is. Here the stream itself decides, so it holds for
everything that writes to it (prints, warnings, progress bars, other libraries): the first time that it cannot be
written, /dev/null takes its place, and the process goes on. It raises only where what it loses is what the command is
for: on standard output, unless a run has called `output_is_spare`, or the reader has just had enough (`| head`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

NAMES = ("standard input", "standard output", "standard error")  # by their descriptors
_spare = False
_lost: OSError | None = None  # what was raised, perhaps to somebody who does not pass it on, as argparse


def guard_output() -> None:
    """Make sys.stdout and sys.stderr such streams. Those that a test or a notebook has put there stay."""
    for descriptor in range(len(NAMES)):  # a closed one would be the number of the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _wrapped(sys.stdout, 1)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _wrapped(sys.stderr, 2)


def output_is_spare() -> None:
    """From now on the process goes on without standard output too: what it does is in files."""
    global _spare
    _spare = True


def flush_output() -> None:
    """Bring out what was printed.

    Raises:
        OSError: standard output cannot be written, and is not spare.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if _lost is not None:
        raise _lost


def _wrapped(stream: Any, descriptor: int) -> TextIO:
    """A stream as Python made it, anew; None where it was closed."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Stream(descriptor)), encoding="utf-8", line_buffering=True)
    stream.flush()
    raw = _Stream(descriptor)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Stream(io.FileIO):
    """A standard stream that goes on as /dev/null."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            name = NAMES[self.fileno()]
            self._give_up()
            nobody_reads = error.errno == errno.EPIPE
            if not (_spare or nobody_reads or self.fileno() == 2):
                global _lost
                _lost = OSError(error.errno, error.strerror, name)
                raise _lost from error
            if _spare or not nobody_reads:
                self._tell(f"warning: {name} cannot be written ({error.strerror}); going on without it\n")
            return memoryview(data).nbytes

    def _give_up(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # so it holds for what is not Python too
        os.close(null)

    def _tell(self, text: str) -> None:
        """On the other stream, if that goes elsewhere."""
        with contextlib.suppress(OSError):
            os.write(3 - self.fileno(), text.encode())
