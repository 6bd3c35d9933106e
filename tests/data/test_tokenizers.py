"""Tokenizers: round trips, refusals, and that saving loses nothing."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep.embedded import topics_text
from s2moe.data import (
    ByteTokenizer,
    CharacterTokenizer,
    CorpusError,
    ReducedByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from s2moe.data.subwords import SEGMENT_CHARACTERS, segments
from s2moe.data.tokenizers import TEXT8_ALPHABET

STRANGE = "héllo\t  two  spaces\r\n\n日本語 \U0001f600 \x00 \u2028 end\n "
PROSE = "".join(
    f"The {a} {b} of the {c}, line {i}.\n"
    for i, (a, b, c) in enumerate(
        zip(
            random.Random(0).choices(["old", "new", "bright", "quiet", "small"], k=400),
            random.Random(1).choices(["house", "garden", "morning", "river"], k=400),
            random.Random(2).choices(["village", "winter", "captain", "mountain"], k=400),
            strict=True,
        )
    )
)


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train([PROSE], vocab_size=330)


def every_tokenizer(trained: SentencePieceTokenizer) -> list[Tokenizer]:
    return [
        ByteTokenizer(),
        ReducedByteTokenizer(STRANGE.encode(), "eos"),
        CharacterTokenizer(STRANGE + PROSE),
        trained,
    ]


def test_every_tokenizer_gives_strange_text_back(trained: SentencePieceTokenizer) -> None:
    for tokenizer in every_tokenizer(trained):
        ids = tokenizer.encode(STRANGE)
        assert ids.dtype.kind == "u"
        assert ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == STRANGE, tokenizer.kind
        assert tokenizer.decode_bytes(ids) == STRANGE.encode()
        assert np.array_equal(tokenizer.encode(STRANGE.encode()), ids)
        assert tokenizer.decode([]) == ""
        assert tokenizer.encode("").size == 0


def test_every_tokenizer_survives_saving(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    words = WordTokenizer.from_texts([PROSE])
    for number, tokenizer in enumerate([*every_tokenizer(trained), words]):
        directory = tmp_path / str(number)
        directory.mkdir()
        written = tokenizer.save(directory)
        assert sorted(written) == sorted(directory.iterdir())
        loaded = load_tokenizer(directory)
        assert type(loaded) is type(tokenizer)
        assert loaded.vocab_size == tokenizer.vocab_size
        text = "The old house of the village, line 1.\n"
        if tokenizer.kind != "reduced-byte":
            assert np.array_equal(loaded.encode(text), tokenizer.encode(text))


def test_loading_from_an_empty_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_bytes_take_anything_and_decoding_replaces_what_is_not_text() -> None:
    data = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8).tobytes()
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.decode([65, 255, 66]) == "A\ufffdB"
    assert tokenizer.decode([65, 300, -1, 66]) == "A\ufffd\ufffdB"


def test_characters_are_sorted_and_text8_has_its_27() -> None:
    assert CharacterTokenizer("banana split").alphabet == " abilnpst"
    text8 = CharacterTokenizer(TEXT8_ALPHABET)
    assert text8.vocab_size == 27
    assert text8.encode(" az").tolist() == [0, 1, 26]
    pieces = CharacterTokenizer.from_texts(["zé", b"a\xe6\x97\xa5"])
    assert pieces.alphabet == "azé日"


def test_characters_outside_the_alphabet_are_refused_and_replaced() -> None:
    tokenizer = CharacterTokenizer("abc")
    with pytest.raises(CorpusError, match="'x' is not among this tokenizer's 3 characters"):
        tokenizer.encode("abxc")
    with pytest.raises(CorpusError, match=r"not UTF-8 .*offset 2"):
        tokenizer.encode(b"ab\xff")
    assert tokenizer.decode([0, 3, 2]) == "a\ufffdc"


def test_the_two_older_byte_protocols() -> None:
    text = b"one\ntwo\n"
    dropped, marked = ReducedByteTokenizer(text, "drop"), ReducedByteTokenizer(text, "eos")
    assert (dropped.vocab_size, marked.vocab_size) == (5, 6)  # e n o t w, and the newline
    assert dropped.decode(dropped.encode(text)) == "onetwo"
    assert dropped.count_symbols(dropped.encode(text)) == 6
    assert marked.decode(marked.encode(text)) == "one\ntwo\n"
    with pytest.raises(CorpusError, match="byte 120"):
        marked.encode(b"x")


def test_words_count_one_eos_a_line_and_know_only_the_training_words() -> None:
    tokenizer = WordTokenizer.from_texts([" \n = Title = \n \n", "the cat the <unk> cat the \n"])
    assert tokenizer.words[:4] == ("<eos>", "the", "=", "cat")  # by frequency, then alphabet
    assert tokenizer.vocab_size == 6
    ids = tokenizer.encode("\nthe dog\nthe cat")
    assert tokenizer.decode(ids) == "\nthe <unk>\nthe cat\n"
    assert ids.size == 7


def test_the_training_words_hold_a_special_token_that_the_text_lacks() -> None:
    assert WordTokenizer.from_texts(["a b a"]).words == ("<eos>", "<unk>", "a", "b")


def test_sentencepiece_trains_to_the_size_asked_and_shortens_the_text() -> None:
    text = topics_text().decode()[:100_000]
    tokenizer = SentencePieceTokenizer.train([text], vocab_size=1000)
    assert tokenizer.vocab_size == 1000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.size < 0.5 * len(text)
    assert tokenizer.count_symbols(tokenizer.encode("é日")) == 2


def test_sentencepiece_training_repeats_itself(trained: SentencePieceTokenizer) -> None:
    assert SentencePieceTokenizer.train([PROSE], vocab_size=330).model == trained.model


def test_sentencepiece_vocabularies_that_cannot_be_name_the_limit() -> None:
    with pytest.raises(CorpusError, match=r"too small for 60000 pieces; give --vocab-size \d+"):
        SentencePieceTokenizer.train([PROSE], vocab_size=60_000)
    with pytest.raises(CorpusError, match="raise --vocab-size"):
        SentencePieceTokenizer.train([PROSE], vocab_size=100)


def test_a_given_model_is_used_without_its_normalisation(tmp_path: Path) -> None:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # the library's defaults: NFKC, squeezed spaces, a leading space
        sentence_iterator=iter(PROSE.splitlines()),
        model_writer=trained,
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path / "given.model"
    path.write_bytes(trained.getvalue())
    tokenizer = SentencePieceTokenizer.from_file(path)
    assert tokenizer.decode(tokenizer.encode("  ①  of ﬁve \n\n the house ")) == "  ①  of ﬁve \n\n the house "


def test_a_given_model_that_would_lose_text_is_refused(tmp_path: Path) -> None:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()), model_writer=trained, vocab_size=80, minloglevel=2
    )
    with pytest.raises(CorpusError, match="no piece for '日本'"):
        SentencePieceTokenizer(trained.getvalue()).encode("house 日本")
    (tmp_path / "not.model").write_bytes(b"nonsense")
    with pytest.raises(CorpusError, match="not a readable SentencePiece model"):
        SentencePieceTokenizer.from_file(tmp_path / "not.model")
    with pytest.raises(CorpusError, match="cannot read"):
        SentencePieceTokenizer.from_file(tmp_path / "absent.model")


def test_segments_join_to_the_text_and_stay_short() -> None:
    text = "short\n\n" + "x" * (2 * SEGMENT_CHARACTERS + 5) + "\n" + "y" * SEGMENT_CHARACTERS + "\nend"
    pieces = list(segments(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= SEGMENT_CHARACTERS


def test_fingerprints_tell_tokenizers_apart(tmp_path: Path) -> None:
    words = WordTokenizer(["<eos>", "<unk>", "a"])
    tokenizers = [ByteTokenizer(), CharacterTokenizer("abc"), CharacterTokenizer("abd"), words]
    fingerprints = [tokenizer.fingerprint() for tokenizer in tokenizers]
    assert len(set(fingerprints)) == 4
    assert CharacterTokenizer("cba").fingerprint() == fingerprints[1]
    tokenizers[2].save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == fingerprints[2]
