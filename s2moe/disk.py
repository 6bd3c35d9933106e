"""A full disk, by whatever name a library gives it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, beyond what a file may have (ulimit -f)
_OF_TORCH = ("PytorchStreamWriter failed writing", "basic_ios::clear", "unexpected pos")  # all that torch.save says
_TEXTS = (*map(os.strerror, _FULL), *_OF_TORCH)  # safetensors has the system's words


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an error, or what it came from, is about."""
    return _cause(error) is not None


def told_of_disk(error: BaseException) -> str:
    """For the user: what could not be written, and why, of such an error."""
    cause = _cause(error) or error
    if isinstance(cause, OSError):
        return f"cannot write {cause.filename or 'a file'}: {cause.strerror}"
    return f"cannot write a file, as on a full disk ({' '.join(str(cause).split())[:200]})"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, an error of the system that names no file names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _cause(error: BaseException) -> BaseException | None:
    """Which of the errors is about a full disk: one that names its file, where there is one."""
    found: list[BaseException] = []
    place: BaseException | None = error
    while place is not None and place not in found:
        found.append(place)
        place = place.__cause__ or place.__context__
    about = [
        place
        for place in found
        if (place.errno in _FULL if isinstance(place, OSError) else any(text in str(place) for text in _TEXTS))
    ]
    return next((place for place in about if getattr(place, "filename", None)), about[-1] if about else None)
