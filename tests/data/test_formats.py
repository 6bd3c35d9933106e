"""What `python -m data_prep text` is given: text in every packing is read, everything else is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.__main__ import main
from data_prep.text8 import prepare_text8
from s2moe.data import Corpus, CorpusError

from .test_prepare_releases import LETTERS, Output, release_of

DOCUMENTS = [f"document {number} says hello" for number in range(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
TEXT = "\n".join([*DOCUMENTS, ""]).encode()
OF_LINES = "".join(f"{text}\n\n" for text in DOCUMENTS).encode()
BOM = b"\xef\xbb\xbf"


def prepare(path: Path, *arguments: str) -> int:
    return main(["text", "--source", str(path), "--out", str(path.parent / "out"), *arguments])


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def encrypted() -> bytes:
    """A zip that says that its file is."""
    content = bytearray(zipped({"a.txt": TEXT}))
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(magic) + place] |= 1
    return bytes(content)


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    return out.getvalue()


def packed_by_arrow(codec: str) -> bytes:
    return bytes(pyarrow.compress(LINES, codec, asbytes=True))


def tabled() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", LINES, OF_LINES),
        ("a.jsonlines", LINES, OF_LINES),
        ("a.ndjson", BOM + LINES, OF_LINES),
        ("a.jsonl.gz", gzip.compress(LINES), OF_LINES),
        ("a.jsonl.xz", lzma.compress(LINES), OF_LINES),
        ("a.jsonl.bz2", bz2.compress(LINES), OF_LINES),
        ("crawl.zip", zipped({"a.jsonl": LINES, "__MACOSX/a.jsonl": b"shadow"}), OF_LINES),
        ("book.zip", zipped({"a.txt": LINES}), LINES),
        ("book.txt", BOM + TEXT, TEXT),
        ("book.bz2", bz2.compress(TEXT), TEXT),
        ("windows.txt", TEXT.replace(b"\n", b"\r\n"), TEXT.replace(b"\n", b"\r\n")),
        ("latin.txt", "é".encode("latin-1") * 50 + TEXT, "é".encode("latin-1") * 50 + TEXT),  # bytes as any others
    ],
)
def test_text_is_read_whatever_holds_it(tmp_path: Path, name: str, content: bytes, expected: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert prepare(tmp_path / name) == 0
    corpus = Corpus.open(tmp_path / "out")
    assert b"".join(corpus.text_bytes(split) for split in ("train", "valid", "test")) == expected


@pytest.mark.parametrize("renamed", [False, True], ids=["by name", "by content"])
@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl.zst", packed_by_arrow("zstd"), "is Zstandard, which cannot be read yet"),
        ("a.lz4", packed_by_arrow("lz4"), "is LZ4"),
        ("a.parquet", tabled(), "is Parquet, which cannot be read yet; give the directory that it lies in with --data"),
        ("a.tar.gz", gzip.compress(tar()), "is tar"),
        ("a.tar", tar(), "is tar"),
        ("a.pdf", b"%PDF-1.7\n" + TEXT, "is PDF"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + TEXT, "is 7-Zip"),
        ("wide.txt", TEXT.decode().encode("utf-16"), "is UTF-16"),
        ("wide_without_mark.txt", TEXT.decode().encode("utf-16-le"), "is not text"),
        ("photo.png", b"\x89PNG\r\n\x1a\n" + os.urandom(500), "is not text"),
        ("noise.txt", bytes(range(1, 256)) * 3, "is not text"),
        ("photo.zip", zipped({"a.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}), "is not text"),
        ("empty.zip", zipped({}), "holds not one file but nothing"),
        ("two.zip", zipped({"a.txt": TEXT, "b.txt": TEXT}), "holds not one file but a.txt, b.txt"),
        ("locked.zip", encrypted(), "is encrypted"),
        ("cut.zip", zipped({"a.txt": TEXT})[:-30], "damaged"),
        ("cut.gz", gzip.compress(TEXT)[:-30], "damaged"),
        ("cut.bz2", bz2.compress(TEXT)[:-30], "damaged"),
        ("cut.xz", lzma.compress(TEXT)[:-30], "damaged"),
        ("flipped.gz", gzip.compress(TEXT)[:40] + b"\xff\xff\xff\xff" + gzip.compress(TEXT)[44:], "damaged"),
        ("flipped.bz2", bz2.compress(TEXT)[:40] + b"\xff\xff\xff\xff" + bz2.compress(TEXT)[44:], "damaged"),
        ("blank.txt", b" \n\t\r\n" * 100, "there is no text in it"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, problem: str, renamed: bool
) -> None:
    path = tmp_path / ("book.txt" if renamed else name)
    path.write_bytes(content)
    assert prepare(path) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (json.dumps([{"text": "a"}] * 5), ":1: a list instead of an object"),
        ('{"text": "a"}\n{"text": null}', ":2: the field 'text' is null, not a text; take the line out"),
        ('{"text": "a"}\n{"text": 3}', ":2: the field 'text' is 3, not a text"),
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", ":1: its brackets are nested too deep"),
        ("\n".join('{"text": ""}' for _ in range(50)), "there is no text in it"),
        ("null", ":1: null instead of an object"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines)
    assert prepare(tmp_path / "a.jsonl") == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "--field" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--field", "body"], "--field names a field of JSON lines"),
        (["--fractions", "nan", "0.5", "0.5"], "--fractions nan 0.5 0.5"),
        (["--fractions", "inf", "0.5", "0.5"], "--fractions inf 0.5 0.5"),
        (["--tokenizer", "sentencepiece", "--vocab-size", "0"], "--vocab-size must be at least 1, got 0"),
        (["--tokenizer", "sentencepiece", "--vocab-size", "-3"], "--vocab-size must be at least 1, got -3"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert prepare(tmp_path / "a.txt", *arguments) == 2
    assert problem in capsys.readouterr().err


def test_a_file_of_two_names_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
    assert prepare(tmp_path / "*.txt") == 0
    assert sum(split.tokens for split in Corpus.open(tmp_path / "out").metadata.splits.values()) == len(TEXT)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    """As a shell's <(command) is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(BOM + TEXT,), daemon=True)
    writer.start()
    assert prepare(pipe) == 0
    writer.join(timeout=10)
    assert sum(split.tokens for split in Corpus.open(tmp_path / "out").metadata.splits.values()) == len(TEXT)


def test_a_part_of_text8_is_that_of_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = release_of("text8", LETTERS + b"abc")
    for number in (1, 2):
        (tmp_path / f"copy{number}").write_bytes(LETTERS[: -number * 1000])
    output = Output(tmp_path / "out")
    prepare_text8(output, tmp_path / "copy1", True, release)
    prepare_text8(output, tmp_path / "copy1", True, release)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(CorpusError, match="holds another corpus"):
        prepare_text8(output, tmp_path / "copy2", True, release)
    assert main(["text8", "--allow-partial", "--out", str(tmp_path / "new")]) == 2
    assert "--allow-partial is about a local copy" in capsys.readouterr().err


def test_a_directory_of_parquet_is_a_data_set(tmp_path: Path) -> None:
    """As the message for a single file says."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(tabled())
    assert main(["text", "--dataset", str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 0
    assert Corpus.open(tmp_path / "out").text_bytes("train") == OF_LINES[: len(OF_LINES) * 9 // 10]
