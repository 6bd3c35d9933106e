"""Byte and character tokenizers, numpy table look-ups (100 MB in about a second), and :func:`load_tokenizer`.

SentencePiece is in ``subwords.py``, words in ``words.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from s2moe.data.errors import CorpusError
from s2moe.data.subwords import SentencePieceTokenizer
from s2moe.data.tokenizer_base import (
    REPLACEMENT,
    TOKENIZER_FILE,
    Tokenizer,
    Tokens,
    as_bytes,
    as_text,
    integer_ids,
    token_dtype,
)
from s2moe.data.words import WordTokenizer

NEWLINE = 10
CODE_POINTS = 0x110000
TEXT8_ALPHABET = " abcdefghijklmnopqrstuvwxyz"


class ByteTokenizer(Tokenizer):
    """One token a byte, vocabulary 256; lossless on any bytes."""

    kind = "byte"
    symbol = "byte"
    cut = "byte"

    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str | bytes) -> Tokens:
        return np.frombuffer(as_bytes(text), dtype=np.uint8).copy()

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        return _look_up_bytes(integer_ids(ids), np.arange(256, dtype=np.uint8))

    @classmethod
    def _load(cls, directory: Path, state: dict[str, Any]) -> ByteTokenizer:
        return cls()


class ReducedByteTokenizer(Tokenizer):
    """One token a byte over only the bytes that occur, for the older enwik8 protocols.

    ``newline`` is "drop" (Transformer-XL: newline bytes vanish, neither seen nor scored) or "eos" (AWD-LSTM
    and its descendants: a newline is the token <eos>). Symbols are the scored tokens.
    """

    kind = "reduced-byte"
    symbol = "byte"
    cut = "byte"

    def __init__(self, alphabet: bytes, newline: Literal["drop", "eos"]) -> None:
        occurring = set(alphabet) - {NEWLINE} if newline == "drop" else set(alphabet) | {NEWLINE}
        self.alphabet = bytes(sorted(occurring))
        self.newline = newline
        self._bytes = np.frombuffer(self.alphabet, dtype=np.uint8)
        self._ids = np.full(256, -1, dtype=np.int16)
        self._ids[self._bytes] = np.arange(len(self.alphabet))

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str | bytes) -> Tokens:
        data = np.frombuffer(as_bytes(text), dtype=np.uint8)
        if self.newline == "drop":
            data = data[data != NEWLINE]
        ids = self._ids[data]
        if ids.size and ids.min() < 0:
            byte = int(data[ids < 0][0])
            raise CorpusError(f"byte {byte} is not among this tokenizer's {self.vocab_size} bytes; leave it out")
        return ids.astype(np.uint8)

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        return _look_up_bytes(integer_ids(ids), self._bytes)

    def _state(self) -> dict[str, Any]:
        return {"alphabet": list(self.alphabet), "newline": self.newline}

    @classmethod
    def _load(cls, directory: Path, state: dict[str, Any]) -> ReducedByteTokenizer:
        return cls(bytes(state["alphabet"]), state["newline"])


class CharacterTokenizer(Tokenizer):
    """One token a character of a fixed alphabet, sorted by code point."""

    kind = "character"
    symbol = "character"
    cut = "character"

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        self._characters = np.array([ord(character) for character in self.alphabet], dtype=np.uint32)
        self._ids = np.full(CODE_POINTS, -1, dtype=np.int32)
        self._ids[self._characters] = np.arange(len(self.alphabet))

    @classmethod
    def from_texts(cls, texts: Iterable[str | bytes]) -> CharacterTokenizer:
        """The alphabet of every character that occurs in ``texts`` (any pieces of a corpus)."""
        seen = np.zeros(CODE_POINTS, dtype=np.bool_)
        for text in texts:
            seen[_code_points(text)] = True
        return cls(map(chr, np.flatnonzero(seen).tolist()))

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str | bytes) -> Tokens:
        points = _code_points(text)
        ids = self._ids[points]
        if ids.size and ids.min() < 0:
            character = chr(int(points[ids < 0][0]))
            raise CorpusError(
                f"character {character!r} is not among this tokenizer's {self.vocab_size} characters; "
                "leave it out, or prepare the corpus with the byte tokenizer, which takes any text"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        array = integer_ids(ids)
        points = np.full(array.shape, ord(REPLACEMENT), dtype="<u4")
        known = (array >= 0) & (array < self.vocab_size)
        points[known] = self._characters[array[known]]
        return points.tobytes().decode("utf-32-le").encode()

    def _state(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet}

    @classmethod
    def _load(cls, directory: Path, state: dict[str, Any]) -> CharacterTokenizer:
        return cls(state["alphabet"])


TOKENIZERS: dict[str, type[Tokenizer]] = {
    cls.kind: cls
    for cls in (
        ByteTokenizer,
        ReducedByteTokenizer,
        CharacterTokenizer,
        SentencePieceTokenizer,
        WordTokenizer,
    )
}


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote into ``directory``; CorpusError where there is none."""
    directory = Path(directory)
    try:
        state = json.loads((directory / TOKENIZER_FILE).read_text(encoding="ascii"))
        return TOKENIZERS[state.pop("kind")]._load(directory, state)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CorpusError(f"{directory} holds no readable tokenizer ({reason}); prepare the corpus again") from error


def _code_points(text: str | bytes) -> NDArray[np.uint32]:
    return np.frombuffer(as_bytes(as_text(text)).decode().encode("utf-32-le"), dtype="<u4")


def _look_up_bytes(ids: NDArray[Any], table: NDArray[np.uint8]) -> bytes:
    known = (ids >= 0) & (ids < len(table))
    if known.all():
        found: bytes = table[ids].tobytes()
        return found
    pieces = (table[i : i + 1].tobytes() if ok else REPLACEMENT.encode() for i, ok in zip(ids, known, strict=True))
    return b"".join(pieces)
