"""The official files of an image set: from a directory or archive at hand, or downloaded; checked by their md5."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import lzma
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import IO

from tqdm import tqdm

from s2moe.data.errors import DAMAGED, CorpusError

BLOCK = 1 << 20
TIMEOUT_SECONDS = 60
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")


@dataclass(frozen=True)
class Published:
    """A file as published: its addresses, tried in order, and its md5, where one is published."""

    name: str
    urls: tuple[str, ...]
    md5: str | None = None


def read_files(
    published: Iterable[Published], members: Mapping[str, str], source: Path | None, directory: Path, official: bool
) -> dict[str, bytes]:
    """The unpacked content of the wanted files, of those that are there.

    Args:
        members: md5 of each wanted file's content, by its name.
        source: a directory, an archive, or None for downloading into ``directory`` what is not there yet.
        official: whether contents must have those md5s.

    Raises:
        CorpusError: nothing can be had, a file is damaged, or it is not the official one.
    """
    if source is None:
        found: dict[str, bytes] = {}
        for file in published:
            found |= read_members(fetch(file, directory), members)
    else:
        found = read_members(source, members)
    for name, official_md5 in members.items():
        if not official or name not in found:
            continue
        md5 = hashlib.md5(found[name], usedforsecurity=False).hexdigest()
        if md5 != official_md5:
            raise CorpusError(
                f"{name} from {source or directory} has md5 {md5}, the official one {official_md5}: get it again, "
                "or set data.options={official: false} for another set like it"
            )
    return found


def require(found: Mapping[str, bytes], names: Iterable[str], where: Path | None, remedy: str = "") -> None:
    """CorpusError that names the files that are not there."""
    missing = [name for name in names if name not in found]
    if missing:
        raise CorpusError(f"{where or 'the download'} has no {', '.join(missing)}{remedy}; give a complete data.source")


def local(source: Path | None, *names: str) -> Path | None:
    """The folder of a set in a directory of several, where there is one; otherwise ``source`` itself."""
    if source is None:
        return None
    if not source.exists():
        raise CorpusError(
            f"{source} does not exist; give data.source, a directory or archive of the official files, or leave it out"
        )
    return next((source / name for name in names if (source / name).is_dir()), source)


def read_members(path: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The files of these names in a directory or archive, in any folder of it, plain or as .gz or .xz."""
    wanted = set(wanted)
    found: dict[str, bytes] = {}
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            for file in files:
                name = plain_name(file.name)
                if name in wanted and name not in found:
                    found[name] = unpack(file.read_bytes())
            for file in files:
                if not found and file.name.endswith(ARCHIVES):
                    found = read_members(file, wanted)
            return found
        for name, content in _open(path, wanted):
            found.setdefault(name, content)
        return found
    except (*DAMAGED, OSError) as error:
        raise CorpusError(f"{path} is damaged or cannot be read ({error}); get it again") from error


def _open(path: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    name = plain_name(path.name)
    if name in wanted:
        yield name, unpack(path.read_bytes())
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            for entry in zipped.namelist():
                if (name := plain_name(PurePosixPath(entry).name)) in wanted:
                    yield name, unpack(zipped.read(entry))
    elif path.name.endswith(ARCHIVES) or tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:  # in one pass: going back would unpack again
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None and (name := plain_name(PurePosixPath(member.name).name)) in wanted:
                    yield name, unpack(file.read())
    else:
        raise CorpusError(f"{path} is neither an archive nor one of {', '.join(sorted(wanted))}")


def plain_name(name: str) -> str:
    """Without .gz or .xz; some copies of the idx files have a dot for the last dash."""
    return name.removesuffix(".gz").removesuffix(".xz").replace(".idx", "-idx")


def unpack(content: bytes) -> bytes:
    """Decompressed by what it begins with."""
    if content.startswith(b"\x1f\x8b"):
        return gzip.decompress(content)
    if content.startswith(b"\xfd7zXZ\x00"):
        return lzma.decompress(content)
    return content


def fetch(file: Published, directory: Path) -> Path:
    """The path of a published file in a directory, downloaded if it is not there, and checked.

    It appears under its name only when it is whole and right.

    Raises:
        CorpusError: it cannot be had, or is not the published one.
    """
    path = directory / file.name
    if path.exists():
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "md5").hexdigest()
        if file.md5 is not None and found != file.md5:
            raise CorpusError(f"{path} has md5 {found}, {file.name} as published {file.md5}; delete it")
        return path
    failures = []
    for url in file.urls:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Named by chance: several processes may be at it.
            with NamedTemporaryFile(dir=directory, prefix=f".{file.name}.", delete=False) as part:
                try:
                    _download(url, part, file.md5)
                    os.replace(part.name, path)
                except BaseException:
                    os.unlink(part.name)
                    raise
            return path
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{url}: {getattr(error, 'reason', None) or error}")
    raise CorpusError(
        f"cannot download {file.name} ({'; '.join(failures)}); fetch it yourself and give data.source=PATH"
    )


def _download(url: str, part: IO[bytes], md5: str | None) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        length = int(response.headers.get("Content-Length") or 0)
        title = f"downloading {url.rpartition('/')[2]}"
        with tqdm(desc=title, total=length or None, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            while block := response.read(BLOCK):
                part.write(block)
                digest.update(block)
                bar.update(len(block))
        part.flush()
        if length and part.tell() != length:
            raise urllib.error.URLError(f"only {part.tell():,} of {length:,} bytes came")
        expected = md5 or _announced_md5(response.headers.get_all("x-goog-hash") or [])
    if expected is not None and digest.hexdigest() != expected:
        raise urllib.error.URLError(f"md5 {digest.hexdigest()}, as published {expected}")


def _announced_md5(headers: list[str]) -> str | None:
    """What Google's storage says of a file: ``md5=<base64>``, among several values."""
    values = [value.strip() for header in headers for value in header.split(",")]
    return next((base64.b64decode(value[4:]).hex() for value in values if value.startswith("md5=")), None)
