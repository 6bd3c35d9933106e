"""The classification sets: official formats, honest splits, and what is refused."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest
import torch

from s2moe.data import ByteTokenizer, CharacterTokenizer, CorpusError
from s2moe.data.archives import Files
from s2moe.data.class_files import read_tree
from s2moe.data.classification import (
    TASKS,
    ClassificationData,
    Examples,
    carve,
    class_counts,
    load_classification,
    subset,
)
from s2moe.data.encoding import EncodedTexts, collate, encode_text
from s2moe.data.tokenizers import TEXT8_ALPHABET

from .classification_files import banking, glue, imdb, treebank, zipped


def load(name: str, source: Path) -> ClassificationData:
    data = load_classification(name, source, official=False)
    splits = [set(getattr(data, split).texts) for split in ("train", "validation", "test")]
    assert not splits[0] & splits[1]
    assert not (splits[0] | splits[1]) & splits[2]
    return data


def test_a_tree_is_read_as_people_write_it() -> None:
    line = r"(3 (2 -LRB-) (3 (2 A\/B) (3 (2 ``) (4 (3 great) (2 '')))) (2 -RRB-))"
    assert read_tree(line, "here") == ('( A/B " great " )', 3)
    for broken in ("great film", "(3 (2 great)", "(x (2 great))", "(3 )"):
        with pytest.raises(CorpusError, match="here: not a tree"):
            read_tree(broken, "here")


@pytest.mark.parametrize("archive", [False, True])
def test_sst5_is_the_treebank(tmp_path: Path, archive: bool) -> None:
    source = treebank(tmp_path / "trees")
    data = load("sst5", zipped(source, "trees") if archive else source)
    assert data.sizes() == {"train": 30, "validation": 10, "test": 12}
    assert data.test.labels == [number % 5 for number in range(12)]
    assert data.classes[4] == "very positive"
    assert data.train.texts[0].split()[0] in ("bad", "poor", "awful", "dull")


def test_sst2_of_the_treebank_leaves_neutral_out(tmp_path: Path) -> None:
    data = load("sst2", treebank(tmp_path / "trees"))
    assert data.sizes() == {"train": 24, "validation": 8, "test": 10}
    assert data.train.labels[:4] == [0, 0, 1, 1]


@pytest.mark.parametrize("swapped", [False, True])
def test_sst2_of_glue_tests_on_dev(tmp_path: Path, swapped: bool) -> None:
    """Its dev chooses nothing: the validation split is a part of train."""
    data = load("sst2", glue(tmp_path / "glue", swapped=swapped))
    assert data.sizes() == {"train": 54, "validation": 6, "test": 12}
    assert class_counts(data.validation, data.classes) == {"negative": 3, "positive": 3}
    assert data.test.labels == [0, 1] * 6
    assert data.test.texts[0].split()[0] in ("bad", "poor", "awful", "dull")


def test_banking77(tmp_path: Path) -> None:
    data = load("banking77", banking(tmp_path / "banking"))
    assert data.classes == ("intent_3", "intent_2", "intent_1", "intent_0")
    assert data.sizes() == {"train": 36, "validation": 4, "test": 12}
    assert data.test.labels[:4] == [3, 2, 1, 0]
    assert data.test.texts[0].startswith('Where, "please", is ')
    (tmp_path / "banking" / "categories.json").write_text('["intent_0"]')
    with pytest.raises(CorpusError, match="intent_1"):
        load("banking77", tmp_path / "banking")


@pytest.mark.parametrize("form", ["xz", "gz", ""])
def test_imdb(tmp_path: Path, form: str) -> None:
    data = load("imdb", imdb(tmp_path / "imdb", form))
    assert data.sizes() == {"train": 18, "validation": 2, "test": 8}
    assert data.test.labels == [0, 1] * 4
    assert data.test.texts[0].endswith("The end.")
    assert "<br" not in data.test.texts[0]


def test_copies_of_a_text_stay_together() -> None:
    texts = [f"text {number % 10}" for number in range(40)]
    train, held = carve(Examples(texts, [number % 2 for number in range(40)]), 0.2, 0)
    assert not set(train.texts) & set(held.texts)
    assert len(train.texts) + len(held.texts) == 40
    again = carve(Examples(texts[::-1], [number % 2 for number in range(40)][::-1]), 0.2, 0)
    assert set(again[1].texts) == set(held.texts)
    chosen = {
        tuple(carve(Examples(texts, [number % 2 for number in range(40)]), 0.2, seed)[1].texts) for seed in (1, 2, 3)
    }
    assert len(chosen) > 1
    with pytest.raises(CorpusError, match="leaves nothing"):
        carve(Examples(["a", "b"], [0, 1]), 0.9, 0)


def test_overlap_with_test_is_told(tmp_path: Path) -> None:
    source = glue(tmp_path / "glue")
    train = (source / "train.tsv").read_text().splitlines()
    with (source / "dev.tsv").open("a") as file:
        file.write(train[5] + "\n")
    data = load_classification("sst2", source, official=False)
    assert "1 texts of test are also among those of train or validation" in data.notes


def test_subset(tmp_path: Path) -> None:
    data = load("sst5", treebank(tmp_path / "trees"))
    small = subset(data, 7, 0)
    assert small.sizes() == {"train": 7, "validation": 7, "test": 7}
    assert set(zip(*small.train, strict=True)) <= set(zip(*data.train, strict=True))
    assert "a subset: at most 7 texts of each split" in small.notes
    assert subset(data, 7, 0) == small


def test_other_numbers_than_the_official_ones_are_refused(tmp_path: Path) -> None:
    source = treebank(tmp_path / "trees")
    with pytest.raises(CorpusError, match=r"has 8,544 / 1,101 / 2,210 texts, here are 30 / 10 / 12"):
        load_classification("sst5", source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\nfine\t2\n", "line 2: expected label 0 or 1"),
        ("sentence\tlabel\nfine film\n", "line 2: expected 2 columns, got 1: 'fine film'"),
        ("a\tb\nfine\t1\n", "columns label and sentence"),
        ("sentence\tlabel\n \t1\nfine\t0\nbad\t0\npoor\t1\n", "a text is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    source = glue(tmp_path / "glue")
    (source / "dev.tsv").write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_classification("sst2", source, official=False)


def test_missing_and_damaged_sources(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        load_classification("sst5", tmp_path / "absent")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(CorpusError, match="neither a directory nor"):
        load_classification("sst5", tmp_path / "text")
    with pytest.raises(CorpusError, match=r"expected one file train\.txt"):
        load_classification("sst5", glue(tmp_path / "glue"))
    archive = imdb(tmp_path / "imdb.tar.xz")
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(CorpusError, match=r"cannot be read|neither a directory nor"):
        load_classification("imdb", archive, official=False)


def test_files_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = banking(tmp_path / "files")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(source)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ("train.csv", "test.csv", "categories.json")
    urls = {name: f"http://127.0.0.1:{server.server_port}/{name}" for name in names}
    monkeypatch.setitem(TASKS, "banking77", TASKS["banking77"]._replace(urls=urls))
    try:
        for _ in range(2):
            data = load_classification("banking77", official=False, downloads=tmp_path / "data")
    finally:
        server.shutdown()
        server.server_close()
    assert data.sizes()["test"] == 12
    assert sorted(asked) == sorted(f"/{name}" for name in names)
    with pytest.raises(CorpusError, match=r"fetch it yourself and give data\.source"):
        Files.fetch({"x.csv": urls["train.csv"]}, tmp_path / "other")


def test_encoding() -> None:
    byte = ByteTokenizer()
    assert encode_text(byte, "abcdé", 100).tolist() == list("abcdé".encode())
    assert encode_text(byte, "abcd", 3).tolist() == [97, 98, 99]
    assert encode_text(byte, "abcd", 3, "last").tolist() == [98, 99, 100]
    text8 = CharacterTokenizer(TEXT8_ALPHABET)
    assert text8.decode(encode_text(text8, "It's 12, OK?", 100)) == "it s one two ok"
    few = CharacterTokenizer("abc ")
    assert few.decode(encode_text(few, "a-b c!", 100)) == "ab c"
    with pytest.raises(CorpusError, match="no token"):
        encode_text(few, "xyz", 10)


def test_batches_are_padded_on_the_right() -> None:
    texts = EncodedTexts(Examples(["abc", "a"], [1, 0]), ByteTokenizer(), 10)
    batch = collate([texts[0], texts[1]])
    assert batch["input_ids"].tolist() == [[97, 98, 99], [97, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].equal(torch.tensor([1, 0]))


ODD = "8\u00a01/2 wide\u3000space next\u0085line line\u2028end"  # what str.split and str.splitlines cut


def test_other_white_space_stays(tmp_path: Path) -> None:
    """It stands inside words and sentences of the official files."""
    word = ODD.replace(" ", "")
    trees = tmp_path / "trees"
    trees.mkdir()
    for split in ("train", "dev", "test"):
        (trees / f"{split}.txt").write_text(f"(3 (2 A) (2 {word}))\r\n(1 (2 B) (2 .))\n", newline="", encoding="utf-8")
    assert load_classification("sst5", trees, official=False).train.texts == [f"A {word}", "B ."]
    for source, rows in (
        (glue(tmp_path / "glue"), "{text}\t1\n"),
        (banking(tmp_path / "banking"), "{text},intent_1\n"),
    ):
        name, task = ("train.tsv", "sst2") if "\t" in rows else ("train.csv", "banking77")
        with (source / name).open("a", encoding="utf-8") as file:
            file.write(rows.format(text=ODD))
        data = load_classification(task, source, official=False)
        assert ODD in data.train.texts + data.validation.texts
    reviews = imdb(tmp_path / "imdb", "")
    (reviews / "aclImdb" / "train" / "pos" / "99_8.txt").write_text(ODD, encoding="utf-8")
    data = load_classification("imdb", reviews, official=False)
    assert ODD in data.train.texts + data.validation.texts


def test_half_understood_trees_are_refused() -> None:
    for broken in ("(3 (2 great) film)", "(3 (2 great) (22 film))", "(3 great (2 film))"):
        with pytest.raises(CorpusError, match="not a tree"):
            read_tree(broken, "here")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for source, name, task in (
        (glue(tmp_path / "g"), "train.tsv", "sst2"),
        (banking(tmp_path / "b"), "train.csv", "banking77"),
    ):
        before = load(task, source).train
        path = source / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert load(task, source).train == before


def test_texts_that_are_not_official_are_not_called_so(tmp_path: Path) -> None:
    notes = load("sst2", glue(tmp_path / "glue")).notes
    assert notes == ["in the format of GLUE, not checked to be its texts", "validation: 6 texts of train"]


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1, 2]", "[" * 100_000])
def test_categories_that_are_none(tmp_path: Path, content: str) -> None:
    (banking(tmp_path / "b") / "categories.json").write_text(content)
    with pytest.raises(CorpusError, match=r"categories\.json is not"):
        load("banking77", tmp_path / "b")


@pytest.mark.parametrize("kind", ["encrypted", "deflated", "method"])
def test_zips_that_cannot_be_unpacked(tmp_path: Path, kind: str) -> None:
    path = zipped(treebank(tmp_path / "trees"), "trees")
    content = bytearray(path.read_bytes())
    for magic, flags, method in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        place = -1
        while (place := content.find(magic, place + 1)) >= 0:
            if kind == "encrypted":
                content[place + flags] |= 1
            else:  # text that is said to be packed: by deflate, by a way that zipfile has not
                content[place + method] = 8 if kind == "deflated" else 97
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="cannot be read"):
        load("sst5", path)
