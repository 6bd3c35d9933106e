"""A corpus directory: what is written is read, damage is found, an interruption leaves nothing finished."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from s2moe.data import (
    ByteTokenizer,
    CharacterTokenizer,
    Corpus,
    CorpusError,
    CorpusWriter,
    SentencePieceTokenizer,
    WindowSampler,
    compressor_bits,
    write_corpus,
)
from s2moe.data.writer import RawText, boundary

TEXTS = {"train": "abc " * 500 + "é", "valid": "cab é" * 20, "test": "bca" * 7}
REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_corpus(tmp_path / "c", "letters", TEXTS, CharacterTokenizer("".join(TEXTS.values())))
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.metadata == written.metadata
    assert (corpus.name, corpus.metadata.vocab_size, corpus.metadata.dtype) == ("letters", 5, "uint8")
    for name, text in TEXTS.items():
        stream = corpus.split(name)
        assert isinstance(stream.tokens, np.memmap)
        assert len(stream) == stream.symbols == len(text)
        assert corpus.tokenizer.decode(stream[:]) == text
        assert corpus.text_bytes(name) == text.encode()
        with pytest.raises(ValueError, match="read-only"):
            stream.tokens[0] = 1
    corpus.verify()
    assert WindowSampler(corpus.split("train"), 8, 0).batch(0, 2).shape == (2, 9)
    with pytest.raises(CorpusError, match="no split 'dev'; it has train, valid, test"):
        corpus.split("dev")


def test_symbols_are_bytes_for_bytes_and_characters_for_characters(tmp_path: Path) -> None:
    as_bytes = write_corpus(tmp_path / "b", "b", TEXTS, ByteTokenizer()).metadata
    assert (as_bytes.symbol, as_bytes.splits["valid"].symbols) == ("byte", 120)
    prose = "".join(f"one line of {n} words\n" for n in range(300))
    subwords = SentencePieceTokenizer.train([prose], 300)
    as_subwords = write_corpus(tmp_path / "s", "s", TEXTS, subwords).metadata
    assert (as_subwords.symbol, as_subwords.splits["valid"].symbols) == ("character", 100)
    assert as_subwords.dtype == "uint16"


def test_opening_what_is_not_prepared_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"not a prepared corpus; .*data_prep enwik8 --out .*/enwik8-x"):
        Corpus.open(tmp_path / "enwik8-x")
    with pytest.raises(CorpusError, match="not a prepared corpus"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("file", ["valid.bin", "metadata.json", "s2moe_tokenizer.json"])
@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_a_damaged_file_is_found_and_named(tmp_path: Path, file: str, damage: str) -> None:
    write_corpus(tmp_path / "c", "letters", TEXTS, ByteTokenizer())
    path = tmp_path / "c" / file
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorpusError, match=f"{file}|not a prepared|no readable tokenizer"):
        _ = Corpus.open(tmp_path / "c").tokenizer


def test_a_changed_byte_is_found_by_verify(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", "letters", TEXTS, ByteTokenizer())
    path = corpus.path("valid")
    path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(CorpusError, match=r"valid\.bin has another checksum"):
        Corpus.open(tmp_path / "c").verify()


def test_a_flipped_bit_is_found_when_a_split_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length is as it was. Beyond a size that is left to `verify`."""
    path = write_corpus(tmp_path / "c", "letters", TEXTS, ByteTokenizer()).path("train")
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus.split("valid")) == corpus.metadata.splits["valid"].tokens
    with pytest.raises(CorpusError, match=r"train\.bin has another checksum .*; prepare it again"):
        corpus.split("train")
    monkeypatch.setattr("s2moe.data.corpus.VERIFIED_BYTES", len(content) - 1)
    assert len(corpus.split("train")) == len(content)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", "letters", TEXTS, ByteTokenizer())
    path = tmp_path / "c" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CorpusError, match="has format 2, this version reads 1"):
        Corpus.open(tmp_path / "c")


def test_an_error_while_writing_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", "old", TEXTS, ByteTokenizer())
    with pytest.raises(CorpusError, match="test split is empty"):
        write_corpus(tmp_path / "c", "new", {**TEXTS, "test": ""}, ByteTokenizer())
    assert Corpus.open(tmp_path / "c").name == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_two_writers_at_once_are_kept_apart(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c"), pytest.raises(CorpusError, match="another process is preparing"):
        write_corpus(tmp_path / "c", "second", TEXTS, ByteTokenizer())
    write_corpus(tmp_path / "c", "third", TEXTS, ByteTokenizer())


def test_a_directory_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(CorpusError, match="is not a corpus"):
        write_corpus(tmp_path / "home", "c", TEXTS, ByteTokenizer())
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


# Writes a corpus over an older one in a child that kills itself at its n-th system call of a kind that
# changes the disk, for every n until a child comes through; prints how many were killed.
KILLED_AT_EVERY_POINT = """
import os, pathlib, shutil, signal, sys
from s2moe.data import ByteTokenizer, write_corpus

root = pathlib.Path(sys.argv[1])
sys.stdout.flush()

def dying(function, state):
    def wrapper(*arguments, **options):
        state["left"] -= 1
        if state["left"] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapper

for n in range(1000):
    directory = root / str(n) / "corpus"
    if n % 2:
        write_corpus(directory, "old", {"train": "aa", "valid": "b", "test": "c"}, ByteTokenizer())
    child = os.fork()
    if child == 0:
        state = {"left": n // 2}
        for owner, name in [(os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
                            (pathlib.Path, "open"), (pathlib.Path, "write_text")]:
            setattr(owner, name, dying(getattr(owner, name), state))
        write_corpus(directory, "new", {"train": "AAAA", "valid": "BB", "test": "CC"}, ByteTokenizer())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if n % 2 and status == 0:
        break
    assert status in (0, signal.SIGKILL), status
print(n)
"""


def test_killed_at_any_moment_leaves_a_whole_corpus_or_none(tmp_path: Path) -> None:
    script = [sys.executable, "-c", KILLED_AT_EVERY_POINT, str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    killed = int(result.stdout.split()[-1])
    assert killed > 20
    found = set()
    for n in range(killed):
        directory = tmp_path / str(n) / "corpus"
        if not directory.exists():
            with pytest.raises(CorpusError, match="not a prepared corpus"):
                Corpus.open(directory)
            found.add("none")
        else:
            corpus = Corpus.open(directory)
            corpus.verify()
            assert corpus.text_bytes("train") == {"old": b"aa", "new": b"AAAA"}[corpus.name]
            found.add(corpus.name)
        again = write_corpus(directory, "again", TEXTS, ByteTokenizer())
        again.verify()
        assert [path.name for path in directory.parent.iterdir()] == ["corpus"]  # no leftovers
    assert found == {"none", "old", "new"}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("cut", ["byte", "character", "line"])
def test_pieces_join_to_the_text_and_are_cut_where_allowed(tmp_path: Path, cut: str, size: int) -> None:
    text = "aé日\U0001f600\n\nno line end for a while é\nlast"
    path = tmp_path / "raw"
    path.write_bytes(b"before" + text.encode() + b"after")
    pieces = list(RawText(path, 6, 6 + len(text.encode()), suffix=b"!").chunks(cut, size))
    assert b"".join(pieces) == text.encode() + b"!"
    if cut != "byte":
        assert "".join(piece.decode() for piece in pieces) == text + "!"


def test_lines_are_kept_whole_when_they_fit() -> None:
    assert boundary(b"one\ntwo\nthr", "line") == 8
    assert boundary("aé".encode()[:2], "character") == 1


def test_compressors_know_more_when_given_the_training_text() -> None:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 7, dtype=np.uint8)) for _ in range(2000)]
    given, data = (b" ".join(words[i] for i in rng.integers(0, 2000, n)) for n in (20_000, 1000))
    bits = compressor_bits(data, given)
    assert bits["gzip"]["alone"] == 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    assert bits["xz"]["given"] < 0.6 * bits["xz"]["alone"]
    assert set(bits) == {"gzip", "bzip2", "xz"}
    with pytest.raises(ValueError, match="data is empty"):
        compressor_bits(b"", given)
