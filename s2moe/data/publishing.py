"""A directory that appears complete or not at all, whenever its writer is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from s2moe.data.errors import CorpusError

LOCK_FILE = ".lock"


class AtomicDirectory:
    """Write files into ``workspace``, a hidden sibling; ``publish`` renames it to ``directory``.

    The workspace of a writer that was killed is emptied by the next one; a lock keeps two apart where the
    file system has locks. Leaving the ``with`` block without publishing removes the workspace.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(os.path.realpath(directory))
        self.workspace = self.directory.with_name(f".{self.directory.name}.preparing")
        self._lock: IO[bytes] | None = None
        self._published = False

    def __enter__(self) -> Self:
        self.workspace.mkdir(parents=True, exist_ok=True)
        self._lock = (self.workspace / LOCK_FILE).open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._lock.close()
                raise CorpusError(
                    f"another process is preparing {self.directory}; wait for it, or give another --out"
                ) from error
            # A file system without locks: two preparations at once are then the user's to avoid.
        for leftover in self.workspace.iterdir():
            if leftover.name != LOCK_FILE:
                remove(leftover)
        return self

    def publish(self, replaceable: Callable[[Path], bool]) -> None:
        """Flush everything to disk and move it into place.

        An existing directory is replaced if it is empty or ``replaceable`` says so, else CorpusError.
        """
        for path in self.workspace.iterdir():
            sync(path)
        sync(self.workspace)
        replaced = self.directory.with_name(f".{self.directory.name}.replaced")
        if replaced.exists():
            remove(replaced)
        if self.directory.exists() and any(self.directory.iterdir()):
            if not replaceable(self.directory):
                raise CorpusError(f"{self.directory} exists and is not a corpus; give another --out, or remove it")
            self.directory.rename(replaced)
        self.workspace.rename(self.directory)
        self._published = True
        (self.directory / LOCK_FILE).unlink()  # not before: without it a second writer would enter the workspace
        sync(self.directory.parent)
        if replaced.exists():
            remove(replaced)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            remove(self.workspace)
        if self._lock is not None:
            self._lock.close()


def remove(path: Path) -> None:
    """Delete a file or a directory with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Have the disk hold a file's, or a directory's, content before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
