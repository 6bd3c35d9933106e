"""Files that run code when a careless reader loads them, put in place of each file of a directory."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def as_torch_saves(file: Path, trap: Trap) -> None:
    torch.save(trap, file)


def as_pickle(file: Path, trap: Trap) -> None:
    file.write_bytes(pickle.dumps(trap))


def files_of(directory: Path) -> list[Path]:
    """A directory's files, one of those whose names differ in numbers alone, such as experts."""
    every = sorted(path for path in directory.rglob("*") if path.is_file())
    return list({re.sub(r"\d+", "N", path.name): path for path in every}.values())


def readings(
    directory: Path, read: Callable[[], object], sign: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, BaseException | None]]:
    """What `read` raises with a trap in place of each file in turn, under the file's name. The files come back.

    The traps are, in turns, as torch.save writes them and bare pickles.

    Args:
        sign: called after each change, where the directory has checksums.

    Raises:
        AssertionError: a trap was sprung, or `read` fails with the files as they were.
    """
    sprung = directory.parent / "sprung"
    for file, put in zip(files_of(directory), itertools.cycle((as_torch_saves, as_pickle)), strict=False):
        intact = file.read_bytes()
        put(file, Trap(sprung))
        if file.name != "manifest.json":
            sign()
        error: BaseException | None = None
        try:
            read()
        except Exception as raised:
            error = raised
        assert not sprung.exists(), f"{file} was executed"
        yield str(file.relative_to(directory)), error
        file.write_bytes(intact)
    sign()
    read()
