"""Whether what all processes have written of a checkpoint can be made one: it is there, whole, for the first process.

On machines that do not share a file system each would keep its own part, and half a checkpoint would look complete.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import TrainingError, remains
from .ranks import from_first, gather, rank

TEMPORARY = ".tmp-"  # what a checkpoint's directory begins with until it is one
SEEN_SECONDS = 5.0  # for a network file system to show what another machine wrote
POLL_SECONDS = 0.1
NAMED = 5  # files that a message names at most


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint, as the process knows it that wrote it: bytes, SHA-256, and who that was."""

    size: int
    digest: str
    writer: str


def require_success(
    failures: list[str], digests: dict[Path, str], temporary: Path, saved: int | None
) -> dict[str, Written]:
    """The files of all processes, by their path in the checkpoint. Collective.

    Args:
        saved: step of the newest complete checkpoint, for the message.

    Raises:
        TrainingError: on every process if one of them failed, after removing what was written.
    """
    writer, mine, failures = f"rank {rank()} on {socket.gethostname()}", {}, [*failures]
    try:
        if not failures:
            for path, value in digests.items():
                mine[str(path.relative_to(temporary))] = Written(path.stat().st_size, value, writer)
    except OSError as error:
        failures.append(str(error))
    gathered = gather((failures, mine))
    first = next((failure for failures_of, _ in gathered for failure in failures_of), None)
    if first is None:
        return {name: file for _, files in gathered for name, file in files.items()}
    raise _given_up(temporary, first, "make room", saved)


def require_seen(temporary: Path, written: dict[str, Written], saved: int | None) -> None:
    """Let process 0 find the files of all processes, with their sizes. Collective.

    Args:
        saved: as for ``require_success``.

    Raises:
        TrainingError: on every process if it does not, after removing what was written.
    """
    missing = _missing(temporary, written) if rank() == 0 else []
    first, place, missing = from_first((f"rank 0 on {socket.gethostname()}", str(temporary.resolve()), missing))
    if missing:
        more = len(missing) - NAMED
        problem = f"{first} does not find in {place}: {', '.join(missing[:NAMED])}"
        problem += f", and {more} more" if more > 0 else ""
        raise _given_up(temporary, problem, "give an output_dir on a file system that all processes see", saved)


def _missing(temporary: Path, written: dict[str, Written]) -> list[str]:
    """Those of the files that are not there as they were written, after waiting for a network file system a while."""
    deadline = time.monotonic() + SEEN_SECONDS
    missing = dict(written)
    while True:
        missing = {name: file for name, file in missing.items() if _size(temporary / name) != file.size}
        if not missing or time.monotonic() > deadline:
            return [f"{name} of {file.writer}" for name, file in sorted(missing.items())]
        time.sleep(POLL_SECONDS)


def _size(path: Path) -> int | None:
    """As the file server has it: opening asks for it anew, where a plain look may take what this machine remembers."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError:
        return None


def _given_up(temporary: Path, problem: str, remedy: str, saved: int | None) -> TrainingError:
    """Remove what was written; the error to raise, on every process."""
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    return TrainingError(
        f"cannot write the checkpoint {temporary.name.removeprefix(TEMPORARY)}: {problem}: {remedy}; {remains(saved)}"
    )
