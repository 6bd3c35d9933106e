"""Characters, bytes and words of any part of a token stream, against a plain count of the text it stands for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from s2moe.data import (
    ByteTokenizer,
    CharacterTokenizer,
    CorpusError,
    ReducedByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenStream,
    WindowSampler,
    WordTokenizer,
    write_corpus,
)
from s2moe.data.corpus import CHUNK_TOKENS
from s2moe.data.units import bits_per_symbol, unit_of
from s2moe.hub import save_tokenizer
from s2moe.training.run_symbol import symbol_of_run

PROSE = "".join(f"The  old house of the river, line {i}: ёлочка в лесу\n" for i in range(300))
TEXT = "the old river, ёлочка; 日本語 \U0001f600 q7 z9\n\n  two  spaces " * 12 + PROSE[:400]
KINDS = ("byte", "drop", "eos", "character", "word", "sentencepiece")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "byte": ByteTokenizer(),
        "drop": ReducedByteTokenizer(TEXT.encode(), "drop"),
        "eos": ReducedByteTokenizer(TEXT.encode(), "eos"),
        "character": CharacterTokenizer(TEXT),
        "word": WordTokenizer.from_texts([TEXT]),
        "sentencepiece": SentencePieceTokenizer.train([PROSE], 320),  # 日, 本, 語, the face and others fall into bytes
    }


def bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    """What one token stands for."""
    if isinstance(tokenizer, SentencePieceTokenizer) and (piece := tokenizer.pieces()[token]).startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return tokenizer.decode_bytes([token])


def begun_characters(data: bytes) -> int:
    """Characters of a text's beginning, one that is cut at its end included."""
    whole = data.decode(errors="ignore")
    return len(whole) + (len(whole.encode()) < len(data))


def plain_counts(tokenizer: Tokenizer, ids: np.ndarray) -> list[int]:
    """Symbols of the first n tokens, for every n."""
    if tokenizer.symbol != "character":
        return list(range(len(ids) + 1))
    pieces = [bytes_of(tokenizer, int(token)) for token in ids]
    assert b"".join(pieces) == TEXT.encode()
    ends = np.cumsum([0, *map(len, pieces)])
    return [begun_characters(TEXT.encode()[:end]) for end in ends]


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_text_counts_its_symbols(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    corpus = write_corpus(tmp_path / kind, kind, {"train": TEXT, "valid": TEXT, "test": TEXT}, tokenizer)
    stream, ids = corpus.split("test"), tokenizer.encode(TEXT)
    counts = plain_counts(tokenizer, ids)
    whole = {"character": len(TEXT), "word": len(ids), "byte": len(TEXT.encode()) - TEXT.count("\n") * (kind == "drop")}
    assert stream.symbols == counts[-1] == stream.count_symbols(0, len(ids)) == whole[tokenizer.symbol]
    for start, stop in np.random.default_rng(0).integers(0, len(ids) + 1, (200, 2)).tolist():
        assert stream.count_symbols(start, stop) == max(0, counts[max(start, stop)] - counts[start])
    for symbols in (0, 1, 2, 100, 333, counts[-1], 10**9):
        tokens = stream.tokens_within(symbols)
        assert counts[tokens] <= symbols
        assert tokens == len(ids) or counts[tokens + 1] > symbols


def test_a_character_of_several_tokens_is_not_cut(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """日 is three bytes: with it the text has one character more, and none until all three are there."""
    tokenizer = tokenizers["sentencepiece"]
    corpus = write_corpus(tmp_path / "c", "c", dict.fromkeys(("train", "valid", "test"), "日本語"), tokenizer)
    stream = corpus.split("test")
    assert [stream.count_symbols(0, n) for n in range(10)] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [stream.tokens_within(n) for n in range(4)] == [0, 3, 6, 9]


def test_a_beginning_is_found_beyond_the_first_piece_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2moe.data.corpus.CHUNK_TOKENS", 7)
    ids = np.random.default_rng(0).integers(0, 3, 50)
    stream = TokenStream("valid", ids, 0, symbols_V=np.array([0, 1, 3]))
    counts = np.cumsum(np.array([0, 1, 3])[ids])
    for symbols in range(int(counts[-1]) + 2):
        assert stream.tokens_within(symbols) == np.count_nonzero(counts <= symbols)
    assert CHUNK_TOKENS > 7


def test_an_id_beyond_the_vocabulary_is_an_error_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a split that is too large to be compared with its checksum."""
    monkeypatch.setattr("s2moe.data.corpus.VERIFIED_BYTES", 0)
    tokenizer = CharacterTokenizer("abc")
    corpus = write_corpus(tmp_path / "c", "c", dict.fromkeys(("train", "valid", "test"), "abc" * 40), tokenizer)
    damaged = bytearray(corpus.path("valid").read_bytes())
    damaged[60] = 200
    corpus.path("valid").write_bytes(damaged)
    stream = corpus.split("valid")
    assert stream[:60].max() == 2
    for read in (
        lambda: stream[50:70],
        lambda: stream.count_symbols(50, 70),
        lambda: WindowSampler(stream, 40, seed=0).batch(0, 2),
        lambda: corpus.text_bytes("valid"),
    ):
        with pytest.raises(CorpusError, match=r"valid\.bin has the id 200, which the vocabulary of 3 has not"):
            read()


def test_the_unit_says_what_was_divided_by() -> None:
    assert [unit_of(symbol) for symbol in ("byte", "character", "word")] == [
        "bits per byte",
        "bits per character",
        "bits per word",
    ]
    assert bits_per_symbol(3 * math.log(2), 2) == pytest.approx(1.5)


def test_a_run_knows_its_symbol_by_its_tokenizer_or_its_corpus(tmp_path: Path) -> None:
    assert symbol_of_run(tmp_path) == "symbol"
    words = WordTokenizer.from_texts(["a b\n"])
    write_corpus(tmp_path / "data", "words", dict.fromkeys(("train", "valid", "test"), "a b\n"), words)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": str(tmp_path / "data")}}))
    assert symbol_of_run(tmp_path) == "word"
    (tmp_path / "hf").mkdir()
    save_tokenizer(ByteTokenizer(), tmp_path / "hf")
    assert symbol_of_run(tmp_path) == "byte"
    (tmp_path / "hf" / "tokenizer_config.json").write_text("[")
    (tmp_path / "config.yaml").write_text("- 1")
    assert symbol_of_run(tmp_path) == "symbol"
