"""Official files: fetch or take a local copy, decompress, and check length and checksum on the way."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import http.client
import lzma
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tqdm import tqdm

from s2moe.data.errors import DAMAGED, CorpusError

BLOCK = 1 << 20
TIMEOUT_SECONDS = 60
ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")  # the second is an empty one


@dataclass(frozen=True)
class Release:
    """A file as published: where it is, what it is called in its archive, its length and md5 when unpacked.

    ``held_out`` is the length of each of its last two parts, the validation and the test split.
    """

    name: str
    url: str
    size: int
    md5: str
    held_out: int


@dataclass(frozen=True)
class Content:
    """What was written to a working file."""

    bytes: int
    sha256: str
    md5: str

    def record(self, **more: Any) -> dict[str, Any]:
        """The ``source`` entry of the metadata."""
        return {**more, "bytes": self.bytes, "sha256": self.sha256}


def obtain(release: Release, source: Path | None, target: Path) -> Content:
    """Write the unpacked release to ``target``, from a local copy (plain, .zip, .xz, .gz, .bz2) or its url.

    Checks nothing but that the archive is whole; see :func:`check_release`.
    """
    if source is None:
        source = target.with_name("download")
        download(release.url, source)
    with open_unpacked(source, release.name) as file:
        blocks = iter(lambda: file.read(BLOCK), b"")
        return spool(blocks, target, f"reading {release.name}", release.size)


def check_release(release: Release, content: Content, source: Path | None) -> None:
    """CorpusError unless ``content`` has the length and md5 of the release."""
    where = release.url if source is None else str(source)
    remedy = f"get {release.url} again" + ("" if source is None else ", or leave --source out")
    if content.bytes != release.size:
        raise CorpusError(f"{where} holds {content.bytes:,} bytes, {release.name} has {release.size:,}; {remedy}")
    if content.md5 != release.md5:
        raise CorpusError(f"{where} has md5 {content.md5}, {release.name} has {release.md5}; {remedy}")


def spool(blocks: Iterable[bytes], target: Path, title: str, total: int | None = None) -> Content:
    """Write ``blocks`` to a working file, with a progress bar."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with target.open("wb") as file, progress_bar(title, total) as bar:
        for block in blocks:
            file.write(block)
            sha256.update(block)
            md5.update(block)
            size += len(block)
            bar.update(len(block))
    return Content(size, sha256.hexdigest(), md5.hexdigest())


def download(url: str, target: Path) -> None:
    """Fetch a url into a file, with a progress bar; CorpusError naming --source where that fails."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, target.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            with progress_bar(f"downloading {url}", total) as bar:
                while block := response.read(BLOCK):
                    file.write(block)
                    bar.update(len(block))
            if total is not None and file.tell() != total:
                raise http.client.IncompleteRead(b"", total - file.tell())
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise CorpusError(f"cannot download {url} ({reason}); fetch it yourself and give --source FILE") from error


@contextmanager
def open_unpacked(path: Path, member: str | None = None) -> Iterator[IO[bytes]]:
    """A file's content, decompressed by what it begins with, whatever its name.

    A .zip gives its file called ``member`` (in any folder), or its only file.
    """
    try:
        with path.open("rb") as raw:
            magic = raw.peek(10)[:10]
            if magic.startswith(b"\xfd7zXZ\x00"):
                with lzma.open(raw) as file:
                    yield cast(IO[bytes], file)
            elif magic.startswith(b"\x1f\x8b"):
                with gzip.open(raw) as file:
                    yield cast(IO[bytes], file)
            elif magic.startswith(b"BZh") and magic[4:] in (b"1AY&SY", b"\x17rE8P\x90"):
                with bz2.open(raw) as file:
                    yield cast(IO[bytes], file)
            elif magic.startswith(ZIP):
                with zipfile.ZipFile(raw) as archive, archive.open(_member(archive, path, member)) as file:
                    yield file
            else:
                yield raw
    except IsADirectoryError as error:
        raise CorpusError(f"{path} is a directory; name the file in it") from error
    except FileNotFoundError as error:
        raise CorpusError(f"{path} does not exist; give an existing file with --source") from error
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's; the file's own have no number, or are of a place in it that cannot be
        raise CorpusError(f"{path} is damaged or cut short ({error}); get it again") from error


def _member(archive: zipfile.ZipFile, path: Path, member: str | None) -> str:
    files = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    named = [name for name in files if member and name.rpartition("/")[2] == member]
    candidates = named or files
    if len(candidates) != 1:
        wanted = f"no file {member!r}" if member else "not one file"
        raise CorpusError(f"{path} holds {wanted} but {', '.join(files[:5]) or 'nothing'}; unpack it and name the file")
    if archive.getinfo(candidates[0]).flag_bits & 1:
        raise CorpusError(f"{path} is encrypted; unpack it with its password and name the file")
    return candidates[0]


def progress_bar(title: str, total: int | None) -> tqdm[Any]:
    """A bar in bytes on a terminal, nothing elsewhere."""
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None, leave=False)


def existing(path: str | os.PathLike[str] | None) -> Path | None:
    """A path given by the user, which must exist."""
    if path is not None and not Path(path).exists():
        raise CorpusError(f"{path} does not exist; give an existing file with --source, or leave --source out")
    return None if path is None else Path(path)
