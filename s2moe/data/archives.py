"""The official files of a data set, wherever they are: a directory, a zip or tar archive, or the network."""

from __future__ import annotations

import http.client
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from torch.hub import download_url_to_file

from s2moe.data.errors import DAMAGED, CorpusError
from s2moe.data.text_lines import decode

UNREADABLE = (*DAMAGED, OSError, UnicodeDecodeError)


class Files:
    """Text files by their names. ``read`` yields (path, content) of those whose path is wanted."""

    def __init__(self, name: str, paths: list[str], read: Callable[[Callable[[str], bool]], Iterator[tuple[str, str]]]):
        self.name = name
        self._paths = paths
        self._read = read

    @classmethod
    def open(cls, path: Path) -> Files:
        """A directory, or a .zip, .tar, .tar.gz or .tar.xz file, whatever its name.

        Raises:
            CorpusError: there is none.
        """
        try:
            if path.is_dir():
                found = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
                return cls.of(str(path), found)
            if not path.exists():
                raise CorpusError(f"{path} does not exist; give data.source, a directory or archive of the files")
            if zipfile.is_zipfile(path):
                return cls(str(path), zipfile.ZipFile(path).namelist(), lambda wanted: _from_zip(path, wanted))
            if tarfile.is_tarfile(path):
                with tarfile.open(path) as archive:
                    names = archive.getnames()
                return cls(str(path), names, lambda wanted: _from_tar(path, wanted))
        except UNREADABLE as error:
            raise CorpusError(f"{path} cannot be read ({error}); get it again") from error
        raise CorpusError(f"{path} is neither a directory nor a zip or tar archive; give one with data.source")

    @classmethod
    def of(cls, name: str, files: Mapping[str, Path]) -> Files:
        """Single files under names of their own."""

        def read(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
            for path, file in files.items():
                if wanted(path):
                    yield path, decode(file.read_bytes())

        return cls(name, list(files), read)

    @classmethod
    def fetch(cls, urls: Mapping[str, str], directory: Path) -> Files:
        """Download into a directory what is not there yet. One archive, or single files.

        Raises:
            CorpusError: it cannot be had.
        """
        paths = {name: directory / name for name in urls}
        for name, path in paths.items():
            if path.exists():
                continue
            try:
                directory.mkdir(parents=True, exist_ok=True)
                download_url_to_file(urls[name], str(path), progress=sys.stderr.isatty())
            except (OSError, http.client.HTTPException) as error:
                raise CorpusError(
                    f"cannot download {urls[name]} to {path} ({error}); fetch it yourself and give data.source=PATH"
                ) from error
        return cls.open(next(iter(paths.values()))) if len(paths) == 1 else cls.of(str(directory), paths)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, in any folder."""
        return any(PurePosixPath(path).name == name for path in self._paths)

    def text(self, name: str) -> str:
        """The content of the file of this name, in any folder.

        Raises:
            CorpusError: there is none, there are several, or it is not UTF-8.
        """
        found = [path for path in self._paths if PurePosixPath(path).name == name and "__MACOSX" not in path]
        if len(found) != 1:
            shown = ", ".join(self._paths[:6]) or "nothing"
            raise CorpusError(f"{self.name}: expected one file {name}, found {len(found)}; it holds {shown}")
        return self._all(lambda path: path == found[0])[0][1]

    def matching(self, pattern: re.Pattern[str]) -> list[tuple[str, str]]:
        """(path, content) of every file whose path the pattern is found in. Raises CorpusError where unreadable."""
        return self._all(lambda path: pattern.search(path) is not None)

    def _all(self, wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
        try:
            return list(self._read(wanted))
        except UNREADABLE as error:
            raise CorpusError(f"{self.name} cannot be read ({error}); get it again") from error


def _from_zip(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.endswith("/") and wanted(name):
                yield name, decode(archive.read(name))


def _from_tar(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, decode(file.read())
