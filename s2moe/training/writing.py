"""Write the files of a checkpoint to the disk, with their checksums, at once or behind training.

Every process writes and reads back what is its own, so that checksums take no longer with more processes.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch


class Writer:
    """Writes what the engine saves. A file that cannot be written is noted, not raised: processes wait for one another.

    What was written of such a file goes, which on a full disk makes room for the others to go on.

    Attributes:
        failures: what went wrong, for the user.
        digests: of the files written, by their paths. Both are complete after `wait`.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.digests: dict[Path, str] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._work: list[Future[None]] = []

    @contextlib.contextmanager
    def of(self, engine: Any) -> Iterator[None]:
        """Within it, the engine saves through this writer."""
        engine_writer = engine.checkpoint_engine
        write = engine_writer.save
        engine_writer.save = lambda state_dict, path: self.save(state_dict, Path(path), write)
        try:
            yield
        except OSError as error:
            self.failures.append(str(error))
        finally:
            del engine_writer.save  # the class' own comes back

    def save(self, value: Any, path: Path, write: Callable[[Any, str], None]) -> None:
        """Write a file now; its checksum is computed while the next one is written."""
        self._try(path, lambda: write(value, str(path)))
        self._later(path, lambda: self._seal(path))

    def done(self) -> bool:
        """Whether all files are on the disk, or failed."""
        return all(work.done() for work in self._work)

    def wait(self) -> None:
        """Until all files are on the disk, or failed."""
        for work in self._work:
            work.result()
        self._thread.shutdown()

    def _later(self, path: Path, action: Callable[[], None]) -> None:
        self._work.append(self._thread.submit(self._try, path, action))

    def _try(self, path: Path, action: Callable[[], None]) -> None:
        if any(failure.startswith(f"{path}: ") for failure in self.failures):
            return
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError
            self.failures.append(f"{path}: {error}")
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _seal(self, path: Path) -> None:
        sync(path)
        self.digests[path] = digest(path)


class BackgroundWriter(Writer):
    """Copies what the engine saves into memory and writes it from a thread."""

    def save(self, value: Any, path: Path, write: Callable[[Any, str], None]) -> None:
        """Take a copy, as the file will be."""
        content = io.BytesIO()
        self._try(path, lambda: torch.save(value, content))
        self._later(path, lambda: self._write(content, path))

    def _write(self, content: io.BytesIO, path: Path) -> None:
        with content, content.getbuffer() as buffer:
            path.write_bytes(buffer)
            written = sha256(buffer).hexdigest()
        sync(path)
        self.digests[path] = written


def digest(path: Path) -> str:
    """A file's SHA-256, which processors have instructions for. Other threads run meanwhile."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
