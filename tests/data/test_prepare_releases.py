"""enwik8, text8 and WikiText-103 from small files of the official formats."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import Output
from data_prep.enwik8 import RELEASE as ENWIK8
from data_prep.enwik8 import prepare_enwik8
from data_prep.releases import Release
from data_prep.text8 import prepare_text8, short_count
from data_prep.wikitext103 import WordRelease, prepare_wikitext103
from s2moe.data import Corpus, CorpusError

REPOSITORY = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
WIKI = bytes(RNG.choice(np.frombuffer(b"abc <>\n\xc3\xa9\x00", dtype=np.uint8), 20_000))
LETTERS = bytes(RNG.choice(np.frombuffer(b" abcxyz", dtype=np.uint8), 20_000))
DATA = Path(os.environ.get("S2MOE_DATA", REPOSITORY.parent / "shared" / "data"))


def release_of(name: str, content: bytes, url: str = "http://127.0.0.1:9/absent.zip") -> Release:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Release(name=name, url=url, size=len(content), md5=md5, held_out=1000)


def packed(directory: Path, name: str, content: bytes, form: str) -> Path:
    path = directory / f"{name}.{form}"
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
    else:
        pack = {"xz": lzma.compress, "gz": gzip.compress, "txt": bytes}[form]
        path.write_bytes(pack(content))
    return path


@pytest.mark.parametrize("form", ["txt", "xz", "gz", "zip"])
def test_enwik8_from_every_form_of_copy(tmp_path: Path, form: str) -> None:
    source = packed(tmp_path, "enwik8", WIKI, form)
    corpus = prepare_enwik8(Output(tmp_path / "out"), source, release=release_of("enwik8", WIKI))
    assert corpus.text_bytes("train") == WIKI[:18_000]
    assert corpus.text_bytes("valid") == WIKI[18_000:19_000]
    assert corpus.text_bytes("test") == WIKI[19_000:]
    assert corpus.metadata.vocab_size == 256
    assert corpus.metadata.splits["test"].symbols == 1000
    assert corpus.metadata.source["sha256"] == hashlib.sha256(WIKI).hexdigest()


def test_the_real_release_is_the_documented_one() -> None:
    assert (ENWIK8.size, ENWIK8.md5, ENWIK8.held_out) == (10**8, "a1fa5ffddb56f4953e226637dabbb36a", 5 * 10**6)


def test_enwik8_legacy_transformer_xl_drops_newlines(tmp_path: Path) -> None:
    source = packed(tmp_path, "enwik8", WIKI, "txt")
    corpus = prepare_enwik8(Output(tmp_path / "out"), source, "txl", release_of("enwik8", WIKI))
    assert corpus.metadata.vocab_size == len(set(WIKI)) - 1
    for name, text in (("train", WIKI[:18_000]), ("test", WIKI[19_000:])):
        assert corpus.text_bytes(name) == text.replace(b"\n", b"")
        assert corpus.metadata.splits[name].symbols == len(text) - text.count(b"\n")
    assert corpus.name == "enwik8-txl"
    assert corpus.metadata.request["legacy_enwik8"] == "txl"


def test_enwik8_legacy_awd_scores_an_eos_for_every_line(tmp_path: Path) -> None:
    source = packed(tmp_path, "enwik8", WIKI, "txt")
    corpus = prepare_enwik8(Output(tmp_path / "out"), source, "awd", release_of("enwik8", WIKI))
    assert corpus.metadata.vocab_size == len(set(WIKI))
    for name, text in (("train", WIKI[:18_000]), ("valid", WIKI[18_000:19_000]), ("test", WIKI[19_000:])):
        lines = text.decode("latin-1").split("\n")  # each line's bytes and one <eos>, as the reference counts
        lines = lines if lines[-1] else lines[:-1]
        assert corpus.metadata.splits[name].symbols == sum(len(line) + 1 for line in lines)


def test_wrong_content_is_refused(tmp_path: Path) -> None:
    release = release_of("enwik8", WIKI)
    changed = packed(tmp_path, "enwik8", b"X" + WIKI[1:], "txt")
    with pytest.raises(CorpusError, match=r"has md5 .*, enwik8 has .*get http"):
        prepare_enwik8(Output(tmp_path / "out"), changed, release=release)
    short = packed(tmp_path, "enwik8", WIKI[:-1], "gz")
    with pytest.raises(CorpusError, match="holds 19,999 bytes, enwik8 has 20,000"):
        prepare_enwik8(Output(tmp_path / "out"), short, release=release)
    with pytest.raises(CorpusError, match="does not exist"):
        prepare_enwik8(Output(tmp_path / "out"), tmp_path / "absent", release=release)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["xz", "gz", "zip"])
def test_a_cut_archive_is_refused(tmp_path: Path, form: str) -> None:
    source = packed(tmp_path, "enwik8", WIKI, form)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(CorpusError, match="damaged or cut short"):
        prepare_enwik8(Output(tmp_path / "out"), source, release=release_of("enwik8", WIKI))


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one.jpg", "1")
        archive.writestr("two.jpg", "2")
    with pytest.raises(CorpusError, match=r"no file 'enwik8' but one.jpg, two.jpg"):
        prepare_enwik8(Output(tmp_path / "out"), path, release=release_of("enwik8", WIKI))


class Handler(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        if self.path == "/gone.zip":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        half = len(self.content) // 2
        self.wfile.write(self.content[:half] if self.path == "/broken.zip" else self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    Handler.content = packed(tmp_path, "enwik8", WIKI, "zip").read_bytes()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_download(tmp_path: Path, server: str) -> None:
    release = release_of("enwik8", WIKI, f"{server}/enwik8.zip")
    corpus = prepare_enwik8(Output(tmp_path / "out"), release=release)
    assert corpus.text_bytes("valid") == WIKI[18_000:19_000]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".bin", ".json"}  # the archive is gone


@pytest.mark.parametrize("file", ["gone", "broken"])
def test_a_failed_download_names_the_remedy(tmp_path: Path, server: str, file: str) -> None:
    with pytest.raises(CorpusError, match=r"cannot download .*fetch it yourself and give --source FILE"):
        prepare_enwik8(Output(tmp_path / "out"), release=release_of("enwik8", WIKI, f"{server}/{file}.zip"))
    assert not (tmp_path / "out").exists()


def test_text8_has_its_27_characters(tmp_path: Path) -> None:
    source = packed(tmp_path, "text8", LETTERS, "zip")
    corpus = prepare_text8(Output(tmp_path / "out"), source, release=release_of("text8", LETTERS))
    assert corpus.metadata.vocab_size == 27
    assert corpus.split("test")[:5].tolist() == [
        b" abcdefghijklmnopqrstuvwxyz".index(b) for b in LETTERS[19_000:19_005]
    ]
    assert corpus.text_bytes("train") == LETTERS[:18_000]
    assert corpus.metadata.notes == []


def test_a_part_of_text8_is_refused_unless_allowed_and_carries_its_name(tmp_path: Path) -> None:
    release = release_of("text8", LETTERS)
    source = packed(tmp_path, "text8", LETTERS[:14_800], "xz")
    with pytest.raises(
        CorpusError, match=r"14,800 of text8's 20,000 .*--allow-partial .*text8-14800, split 12800/1000"
    ):
        prepare_text8(Output(tmp_path / "out"), source, release=release)
    corpus = prepare_text8(Output(tmp_path / "out"), source, allow_partial=True, release=release)
    assert corpus.name == Corpus.open(tmp_path / "out").metadata.name == "text8-14800"
    assert "not text8" in corpus.metadata.notes[0]
    assert [corpus.metadata.splits[name].symbols for name in ("train", "valid", "test")] == [12_800, 1000, 1000]
    assert corpus.text_bytes("test") == LETTERS[13_800:14_800]


def test_no_partial_leave_for_other_faults(tmp_path: Path) -> None:
    release = release_of("text8", LETTERS)
    for content, problem in ((LETTERS[:2000], "too few"), (LETTERS + b"a", "20,001"), (b"z" + LETTERS[1:], "md5")):
        with pytest.raises(CorpusError, match=problem):
            prepare_text8(Output(tmp_path / "out"), packed(tmp_path, "t", content, "txt"), True, release)
    with pytest.raises(CorpusError, match="'E' is not among"):
        prepare_text8(Output(tmp_path / "out"), packed(tmp_path, "t", b"ENGLISH" * 1000, "txt"), True, release)


def test_short_counts() -> None:
    assert [short_count(n) for n in (74_000_000, 5_000_000, 74_000_001, 999)] == ["74M", "5M", "74000001", "999"]


TOKENS = {
    "train": " \n = The cat = \n \n the cat sat , <unk> the cat \n",
    "valid": " \n the dog sat \n",
    "test": "the cat \n \n",
}


def wikitext(directory: Path) -> tuple[Path, WordRelease]:
    """A directory like the official one; train has = The cat the sat , <unk> and <eos>."""
    (directory / "wikitext-103").mkdir(parents=True)
    for name, text in TOKENS.items():
        (directory / "wikitext-103" / f"wiki.{name}.tokens").write_text(text)
    counts = {name: len(text.split()) + text.count("\n") for name, text in TOKENS.items()}
    return directory, WordRelease(tokens=counts, vocab_size=8)


def test_wikitext103_from_directory_and_archive(tmp_path: Path) -> None:
    directory, release = wikitext(tmp_path / "copy")
    corpus = prepare_wikitext103(Output(tmp_path / "a"), directory, release)
    assert corpus.metadata.symbol == "word"
    assert corpus.metadata.splits["valid"].symbols == 5
    assert corpus.text_bytes("valid") == b"\nthe <unk> sat\n"
    archive = tmp_path / "wikitext-103-v1.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in TOKENS.items():
            file.writestr(f"wikitext-103/wiki.{name}.tokens", text)
    again = prepare_wikitext103(Output(tmp_path / "b"), archive, release)
    assert again.metadata.splits == corpus.metadata.splits


def test_wikitext103_of_another_version_is_refused(tmp_path: Path) -> None:
    directory, release = wikitext(tmp_path / "copy")
    with pytest.raises(CorpusError, match="has 8 words, WikiText-103 has 9"):
        prepare_wikitext103(Output(tmp_path / "a"), directory, replace(release, vocab_size=9))
    more = {**release.tokens, "test": 5}
    with pytest.raises(CorpusError, match="test split of wikitext103 comes to 4 tokens, published are 5"):
        prepare_wikitext103(Output(tmp_path / "a"), directory, replace(release, tokens=more))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"no file wiki.train.tokens"):
        prepare_wikitext103(Output(tmp_path / "b"), tmp_path / "empty", release)


def test_killed_while_reading_leaves_nothing_and_a_second_run_succeeds(tmp_path: Path) -> None:
    """The source is a pipe that stays half full while the preparation is killed."""
    source, out, workspace = tmp_path / "enwik8", tmp_path / "out", tmp_path / ".out.preparing"
    os.mkfifo(source)
    command = [sys.executable, "-m", "data_prep", "enwik8", "--source", str(source), "--out", str(out)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    with source.open("wb") as pipe:  # returns when the other end reads
        pipe.write(b"x" * 3_000_000)
        pipe.flush()
        deadline = time.monotonic() + 60
        while not (workspace / "raw").exists() or (workspace / "raw").stat().st_size < 1_000_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert workspace.exists()
        with pytest.raises(CorpusError, match="not a prepared corpus"):
            Corpus.open(out)
    corpus = prepare_enwik8(Output(out), packed(tmp_path, "e", WIKI, "txt"), release=release_of("enwik8", WIKI))
    corpus.verify()
    assert not workspace.exists()


@pytest.mark.skipif(not (DATA / "enwik8" / "enwik8.xz").exists(), reason="no enwik8 (S2MOE_DATA)")
def test_the_real_enwik8(tmp_path: Path) -> None:
    corpus = prepare_enwik8(Output(tmp_path / "out"), DATA / "enwik8" / "enwik8.xz")
    sizes = [split.symbols for split in corpus.metadata.splits.values()]
    assert sizes == [90_000_000, 5_000_000, 5_000_000]
    newlines = [int(np.count_nonzero(corpus.split(name).tokens == 10)) for name in ("train", "valid", "test")]
    assert newlines == [1_017_182, 54_258, 56_583]  # counted independently on the published file
