"""Contaminated text against a loop over symbols, and by what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest

from s2moe.data import (
    ByteTokenizer,
    CharacterTokenizer,
    CorpusError,
    ReducedByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    corrupt,
)

PROSE = "Whoever reads this, in 1913 or later: naïve cafés stay naïve.\n\n[[Link|a b]] &quot;x&quot; is 3·4!\n" * 40
TEXT8 = "the quick brown fox jumps over a lazy dog and anarchism originated as a term of abuse " * 60


def read(text: str, tokenizer: Tokenizer, kind: str, rate: float, seed: int = 0) -> str:
    return tokenizer.decode(corrupt(tokenizer.encode(text), tokenizer, kind, rate, seed))


def is_letter(character: str) -> bool:
    return character.isascii() and character.isalnum()


def loop(data: bytes, kind: str, rate: float, seed: int) -> bytes:
    """One byte after another, each with its own draw."""
    draws = np.random.default_rng(seed).random(len(data), dtype=np.float32)
    out = bytearray(data)
    if kind == "char_swap":
        n = 0
        while n < len(data) - 1:
            if draws[n] < rate and is_letter(chr(data[n])) and is_letter(chr(data[n + 1])):
                out[n], out[n + 1] = data[n + 1], data[n]
                n += 1
            n += 1
        return bytes(out)
    replacing = inside = False
    for n, byte in enumerate(data):
        was_inside, inside = inside, is_letter(chr(byte)) or byte >= 0x80
        if inside and not was_inside:
            replacing = draws[n] < rate
        if inside and replacing:
            out[n] = ord("A")
    return bytes(out)


@pytest.mark.parametrize("kind", ["char_swap", "word_swap"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_bytes_equal_a_loop_over_them(kind: str, rate: float) -> None:
    data = PROSE.encode()
    for text in (data, b"ab", b"a", b"", b" ", data[7:-3]):
        tokens = ByteTokenizer().encode(text)
        got = corrupt(tokens, ByteTokenizer(), kind, rate, seed=3)
        assert got.dtype == tokens.dtype
        assert got.tobytes() == loop(text, kind, rate, 3)
        assert tokens.tobytes() == text  # which is left alone


@pytest.mark.parametrize(
    ("kind", "text", "want"),
    [
        ("word_swap", "Is it 42? naïve.\n", "AA AA AA? AAAAAA.\n"),  # ï is two bytes
        ("char_swap", "Is it 42? naïve.\nabcde", "sI ti 24? anïev.\nbadce"),
    ],
)
def test_every_word_at_rate_one(kind: str, text: str, want: str) -> None:
    assert read(text, ByteTokenizer(), kind, 1.0) == want


def test_text8_has_no_capitals() -> None:
    tokenizer = CharacterTokenizer(" abcdefghijklmnopqrstuvwxyz")
    assert read("the quick fox", tokenizer, "word_swap", 1.0) == "aaa aaaaa aaa"
    assert read("the quick fox", tokenizer, "char_swap", 1.0) == "hte uqcik ofx"


def test_characters_beyond_ascii_are_letters_of_a_character_corpus() -> None:
    tokenizer = CharacterTokenizer(set("naïve café—A·"))
    assert read("naïve—café·é", tokenizer, "word_swap", 1.0) == "AAAAA—AAAA·A"
    assert read("naïve—café·é", tokenizer, "char_swap", 1.0) == "anvïe—acéf·é"


def test_reduced_bytes_keep_their_newlines() -> None:
    text = b"to be\nor not"
    tokenizer = ReducedByteTokenizer(text + b"A", "eos")
    assert read(text.decode(), tokenizer, "word_swap", 1.0) == "AA AA\nAA AAA"
    assert read(text.decode(), tokenizer, "char_swap", 1.0) == "ot eb\nro ont"


@pytest.mark.parametrize("seed", [0, 1])
def test_rates(seed: int) -> None:
    """A replaced word in five at rate 0.2; swaps as often as their chain of dependent draws predicts."""
    tokenizer = CharacterTokenizer(" abcdefghijklmnopqrstuvwxyz")
    words = TEXT8.split()
    replaced = [set(word) == {"a"} for word in read(TEXT8, tokenizer, "word_swap", 0.2, seed).split()]
    expected = 0.2 + 0.8 * words.count("a") / len(words)
    assert np.mean(replaced) == pytest.approx(expected, abs=4 * (0.16 / len(words)) ** 0.5)

    text = "abcdefghij " * 2000  # all different, so that each swap changes two characters
    changed = np.mean([x != y for x, y in zip(text, read(text, tokenizer, "char_swap", 0.1, seed), strict=True)])
    busy, swaps = 0.0, 0.0
    for _ in range(9):  # probability that a pair is swapped: that of its draw, unless its left was just swapped
        busy = 0.1 * (1 - busy)
        swaps += busy
    assert changed == pytest.approx(2 * swaps / 11, rel=0.06)


@pytest.mark.parametrize("kind", ["char_swap", "word_swap"])
def test_the_same_seed_contaminates_alike_and_another_does_not(kind: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(PROSE)
    first, again, other = (corrupt(tokens, tokenizer, kind, 0.2, seed) for seed in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()
    shorter = corrupt(tokens[:1001], tokenizer, kind, 0.2, 4)
    assert (shorter[:1000] == first[:1000]).all()  # what follows does not matter, but for the last pair
    more = corrupt(tokens, tokenizer, "word_swap", 0.5, 4)
    assert (more == ord("A"))[corrupt(tokens, tokenizer, "word_swap", 0.2, 4) == ord("A")].all()


def test_swaps_stay_within_words_and_move_characters_by_one_place() -> None:
    swapped = read(TEXT8, ByteTokenizer(), "char_swap", 0.4)
    assert swapped != TEXT8
    for before, after in zip(TEXT8.split(" "), swapped.split(" "), strict=True):
        assert sorted(before) == sorted(after)
        n = 0
        while n < len(before):
            pair = before[n : n + 2] != after[n : n + 2] and before[n] != after[n]
            assert not pair or after[n : n + 2] == before[n + 1] + before[n]
            n += 2 if pair else 1


def test_bytes_remain_utf8() -> None:
    for kind in ("char_swap", "word_swap"):
        corrupted = corrupt(ByteTokenizer().encode(PROSE), ByteTokenizer(), kind, 0.7)
        corrupted.tobytes().decode("utf-8", errors="strict")


@pytest.mark.parametrize("known", [True, False])
def test_words_become_the_generic_word(known: bool) -> None:
    text = "the <unk> sat , @-@ on 3 mats .\n\n = AAA =\n" if known else "the cat sat , @-@ on 3 mats .\n"
    tokenizer = WordTokenizer.from_texts([text])
    generic = "AAA" if known else "<unk>"
    want = " ".join(generic if any(map(str.isalnum, word)) else word for word in text.split(" ")[:9])
    got = read(text, tokenizer, "word_swap", 1.0)
    assert got.split("\n")[0] == want.split("\n")[0]
    assert got.count("\n") == text.count("\n")  # <eos> is no word
    assert len(corrupt(tokenizer.encode(text), tokenizer, "word_swap", 1.0)) == len(tokenizer.encode(text))

    many = WordTokenizer.from_texts(["AAA cat dog , \n"])
    tokens = many.encode("cat , dog\n" * 3000)
    corrupted = corrupt(tokens, many, "word_swap", 0.15, 7)
    hit = np.random.default_rng(7).random(len(tokens), dtype=np.float32) < 0.15
    for before, after, drawn in zip(tokens, corrupted, hit, strict=True):
        is_word = many.words[before] in ("cat", "dog")
        assert many.words[after] == ("AAA" if is_word and drawn else many.words[before])


def test_what_makes_no_sense_is_refused_with_a_reason() -> None:
    words = WordTokenizer.from_texts(["a b\n"])
    with pytest.raises(CorpusError, match=r"char_swap needs the characters.*tokens are words: use word_swap"):
        corrupt(words.encode("a b\n"), words, "char_swap", 0.1)
    pieces = SentencePieceTokenizer.train(["some words of a small corpus\n"], 272)
    for kind in ("char_swap", "word_swap"):
        with pytest.raises(CorpusError, match=rf"{kind} is not defined for tokens of the kind 'sentencepiece'"):
            corrupt(pieces.encode("some words"), pieces, kind, 0.1)
    digits = CharacterTokenizer("0123 ")
    with pytest.raises(CorpusError, match="alphabet has neither: use char_swap"):
        corrupt(digits.encode("01 23"), digits, "word_swap", 0.1)
    assert read("01 23", digits, "char_swap", 1.0) == "10 32"
    for kind, rate in (("typos", 0.1), ("char_swap", 1.2), ("char_swap", -0.1), ("char_swap", float("nan"))):
        with pytest.raises(ValueError, match=r"unknown corruption 'typos'|must lie in 0\.\.1"):
            corrupt(words.encode("a b\n"), words, kind, rate)
