"""Write the files of a checkpoint to the disk, with their checksums, at once or behind training.

Every process writes what is its own, and computes the checksum of each piece while it is being written.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any, cast

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
        engine_writer.save = lambda state_dict, path: self.save(state_dict, Path(path))
        try:
            yield
        except OSError as error:
            self.failures.append(str(error))
        finally:
            del engine_writer.save  # the class' own comes back

    def save(self, value: Any, path: Path) -> None:
        """Write a file now; it is brought to the disk while the next one is written."""

        def write() -> None:
            file = HashedFile(path)
            try:
                with file:
                    torch.save(value, cast(IO[bytes], file))
            except RuntimeError as error:  # of torch's writer of archives, which does not say why it could not write
                raise file.failure or error from error
            self.digests[path] = file.digest()

        self._try(path, write)
        self._later(path, lambda: sync(path))

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
        except (OSError, RuntimeError) as error:
            self.failures.append(f"{path}: {(isinstance(error, OSError) and error.strerror) or error}")
            with contextlib.suppress(OSError):
                os.unlink(path)


class BackgroundWriter(Writer):
    """Copies what the engine saves into memory and writes it from a thread."""

    def save(self, value: Any, path: Path) -> None:
        """Take a copy, as the file will be."""
        content = io.BytesIO()

        def write() -> None:
            with HashedFile(path) as file:
                file.write(content.getbuffer())
            self.digests[path] = file.digest()
            sync(path)

        self._try(path, lambda: torch.save(value, content))
        self._later(path, write)


class HashedFile:
    """A new file with the checksum of all that is written to it. Each piece is written and hashed at the same time.

    Attributes:
        failure: why a piece could not be written; torch.save raises an error of its own in its place.
    """

    def __init__(self, path: Path) -> None:
        self.failure: OSError | None = None
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._hash = sha256()
        self._thread = ThreadPoolExecutor(1, "checksum")

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, piece: Any) -> int:
        """All of the bytes."""
        hashed = self._thread.submit(self._hash.update, piece)
        try:
            rest = memoryview(piece).cast("B")
            while rest:  # the system may take a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.failure = error
            raise
        finally:
            hashed.result()
        return memoryview(piece).nbytes

    def flush(self) -> None:
        """Nothing is held back."""

    def digest(self) -> str:
        """Of all pieces, in hexadecimal."""
        return self._hash.hexdigest()


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
