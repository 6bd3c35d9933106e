"""What a file holds, by its name and by how it begins: text, JSON lines, or what cannot be read yet."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from data_prep.releases import open_unpacked
from s2moe.data.errors import CorpusError
from s2moe.data.tables import JSON_LINES

PACKED = (".gz", ".xz", ".bz2", ".zip")
SNIFFED = 1 << 16  # bytes that are looked at, at most
MOST_CONTROLS = 0.02  # of them, in text: no encoding writes characters with these bytes
CONTROLS = bytes(sorted({*range(7), *range(14, 27), *range(28, 32), 127}))
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32's other mark begins with the first


class Unread(NamedTuple):
    """A format that is refused by name, and what to do with it."""

    name: str
    suffixes: tuple[str, ...]
    magic: bytes
    remedy: str
    offset: int = 0  # of the magic bytes

    def fits(self, name: str, head: bytes) -> bool:
        """Whether the name or the first bytes say that it is this."""
        return name.endswith(self.suffixes) or head[self.offset :].startswith(self.magic)


_UNPACK, _TABLE = "unpack it and name the files", "give the directory that it lies in with --dataset"
UNREAD = (
    Unread("Zstandard", (".zst", ".zstd"), b"\x28\xb5\x2f\xfd", "unpack it (zstd -d)"),
    Unread("LZ4", (".lz4",), b"\x04\x22\x4d\x18", "unpack it (lz4 -d)"),
    Unread("Parquet", (".parquet",), b"PAR1", _TABLE),
    Unread("Arrow", (".arrow", ".feather"), b"ARROW1", _TABLE),
    Unread("tar", (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2"), b"ustar", _UNPACK, 257),
    Unread("7-Zip", (".7z",), b"7z\xbc\xaf\x27\x1c", _UNPACK),
    Unread("RAR", (".rar",), b"Rar!\x1a\x07", _UNPACK),
    Unread("PDF", (".pdf",), b"%PDF-", "take its text out (pdftotext)"),
    Unread("office document", (".docx", ".xlsx", ".pptx", ".odt", ".epub"), b"\xd0\xcf\x11\xe0", "save it as text"),
)


@contextmanager
def open_text(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """A text file's content, unpacked, without its byte order mark, and whether it is JSON lines.

    Raises:
        CorpusError: it is not text, or damaged.
    """
    _refuse(path, path.name.lower(), b"")
    with open_unpacked(path) as file:
        name = (file.name if isinstance(file, zipfile.ZipExtFile) else path.name).lower()
        for suffix in PACKED:
            name = name.removesuffix(suffix)
        head = file.peek(SNIFFED)[:SNIFFED]  # type: ignore[attr-defined]  # a pipe cannot be read twice
        _refuse(path, name, head)
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        yield file, name.endswith(JSON_LINES)


def _refuse(path: Path, name: str, head: bytes) -> None:
    """CorpusError for what is not text."""
    for known in UNREAD:
        if known.fits(name, head):
            raise CorpusError(f"{path} is {known.name}, which cannot be read yet; {known.remedy}")
    if head.startswith(WIDE):
        raise CorpusError(f"{path} is UTF-16 or UTF-32, which cannot be read yet; convert it (iconv -t utf-8)")
    controls = len(head) - len(head.translate(None, CONTROLS))
    if b"\0" in head or controls > MOST_CONTROLS * len(head):
        raise CorpusError(
            f"{path} is not text: it begins with bytes that no text holds. If it is in UTF-16, convert it (iconv -f "
            "utf-16 -t utf-8); if it is packed, unpack it"
        )
