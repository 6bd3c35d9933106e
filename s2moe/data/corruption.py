"""Contaminated text: what a model reads when its robustness is measured, symbol for symbol as long as the clean text.

    char_swap   each pair of neighbouring characters of a word is swapped with probability ``rate``; pairs do not
                overlap, so a character moves by one place at most
    word_swap   each word becomes the generic word AAA with probability ``rate``: TextAttack's word swap, by which
                MomentumSMoE (Teo & Nguyen 2024) attacks WikiText-103. Where tokens are words, the token becomes that
                of "AAA" (or <unk>); where they are characters or bytes, each of the word's becomes an A (an a where
                the alphabet has no capitals)

A word is a longest run of letters and digits; a byte beyond ASCII counts as part of a letter, and stays where it is
in a char_swap, so that the text remains UTF-8. Every position draws its own number from ``seed``, so the same text is
contaminated in the same way however it is cut into windows and batches.

Legend: N tokens of a stream, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2moe.data.errors import CorpusError
from s2moe.data.tokenizer_base import Tokenizer
from s2moe.data.tokenizers import ByteTokenizer, CharacterTokenizer, ReducedByteTokenizer
from s2moe.data.words import EOS, UNKNOWN, WordTokenizer

GENERIC_WORD = "AAA"
CORRUPTIONS = ("char_swap", "word_swap")


def corrupt(tokens_N: NDArray[Any], tokenizer: Tokenizer, kind: str, rate: float, seed: int = 0) -> NDArray[Any]:
    """The tokens that a model is to read instead of ``tokens_N``, equally many, in a new array.

    Args:
        kind: one of CORRUPTIONS.
        rate: probability, in [0, 1].

    Raises:
        CorpusError: if this corruption makes no sense for the tokenizer.
        ValueError: for an unknown kind or an impossible rate.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; known: {', '.join(CORRUPTIONS)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate of a corruption is a probability: it must lie in 0..1, got {rate}")
    vocabulary = _vocabulary(tokenizer, kind)
    tokens_N = np.array(tokens_N)
    hit_N = np.random.default_rng(seed).random(len(tokens_N), dtype=np.float32) < rate
    if kind == "char_swap":
        return _swap_neighbours(tokens_N, vocabulary.is_movable_V[tokens_N], hit_N)
    if not vocabulary.tokens_are_words:
        return _replace_words(tokens_N, vocabulary.is_in_word_V[tokens_N], hit_N, vocabulary.filler)
    tokens_N[hit_N & vocabulary.is_in_word_V[tokens_N]] = vocabulary.filler
    return tokens_N


@dataclass(frozen=True)
class _Vocabulary:
    """What corruption has to know of the tokens."""

    is_in_word_V: NDArray[np.bool_]  # tokens that are words, or characters of words
    is_movable_V: NDArray[np.bool_]  # of those the characters that may change places
    filler: int  # stands for a replaced word, or for each of its characters
    tokens_are_words: bool = False


def _vocabulary(tokenizer: Tokenizer, kind: str) -> _Vocabulary:
    if isinstance(tokenizer, WordTokenizer):
        if kind == "char_swap":
            raise CorpusError(
                "char_swap needs the characters that a model reads, and this corpus' tokens are words: use word_swap, "
                "or a corpus prepared with the byte or character tokenizer"
            )
        is_word_V = np.array([word != EOS and any(map(str.isalnum, word)) for word in tokenizer.words])
        filler = tokenizer.words.index(GENERIC_WORD if GENERIC_WORD in tokenizer.words else UNKNOWN)
        return _Vocabulary(is_word_V, is_word_V, filler, tokens_are_words=True)
    if isinstance(tokenizer, CharacterTokenizer):
        alphabet = tokenizer.alphabet
        is_in_word_V = is_movable_V = np.array([character.isalnum() for character in alphabet], dtype=np.bool_)
    elif isinstance(tokenizer, (ByteTokenizer, ReducedByteTokenizer)):
        values = bytes(range(256)) if isinstance(tokenizer, ByteTokenizer) else tokenizer.alphabet
        alphabet = values.decode("latin-1")
        is_movable_V = np.array([bytes([value]).isalnum() for value in values])  # ASCII only
        is_in_word_V = is_movable_V | np.array([value >= 0x80 for value in values])
    else:
        raise CorpusError(
            f"{kind} is not defined for tokens of the kind {tokenizer.kind!r}, which are parts of words: contaminated "
            "text would fall into other and differently many tokens, whose predictions cannot be set against the clean "
            "ones. Use a corpus prepared with the byte, character or word tokenizer"
        )
    filler = next((alphabet.index(character) for character in "Aa" if character in alphabet), -1)
    if filler < 0 and kind == "word_swap":
        raise CorpusError("word_swap writes A or a, and this corpus' alphabet has neither: use char_swap")
    return _Vocabulary(is_in_word_V, is_movable_V, filler)


def _swap_neighbours(tokens_N: NDArray[Any], is_movable_N: NDArray[np.bool_], hit_N: NDArray[np.bool_]) -> NDArray[Any]:
    """Swap n with n + 1 where n is hit, both may move, and n has not just been swapped with n − 1."""
    if len(tokens_N) < 2:
        return tokens_N
    wanted_N = hit_N[:-1] & is_movable_N[:-1] & is_movable_N[1:]
    chosen_N = wanted_N & (_place_in_run(wanted_N) % 2 == 0)
    (left,) = np.nonzero(chosen_N)
    tokens_N[left], tokens_N[left + 1] = tokens_N[left + 1], tokens_N[left]
    return tokens_N


def _replace_words(
    tokens_N: NDArray[Any], is_in_word_N: NDArray[np.bool_], hit_N: NDArray[np.bool_], filler: int
) -> NDArray[Any]:
    """Put ``filler`` for each character of the words whose first character is hit."""
    first_N = np.arange(len(tokens_N)) - _place_in_run(is_in_word_N)
    tokens_N[is_in_word_N & hit_N[first_N]] = filler
    return tokens_N


def _place_in_run(is_in_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each position the number of True values directly before it (where it is itself False, 0)."""
    position_N = np.arange(len(is_in_N))
    outside_N = np.where(is_in_N, -1, position_N)
    return np.where(is_in_N, position_N - np.maximum.accumulate(outside_N) - 1, 0)
