"""What every tokenizer offers, and the conversions they share."""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from s2moe.data.errors import CorpusError

TOKENIZER_FILE = "s2moe_tokenizer.json"  # not tokenizer.json, which transformers would read as its own
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Tokens = NDArray[np.unsignedinteger[Any]]


class Tokenizer(ABC):
    """Text or bytes to a flat array of token ids and back.

    ``symbol`` is the unit that a figure per symbol is divided by; ``cut`` says where a long text may be cut
    into pieces so that encoding the pieces one by one equals encoding the whole.
    """

    kind: ClassVar[str]
    symbol: ClassVar[Literal["byte", "character", "word"]]
    cut: ClassVar[Literal["byte", "character", "line"]]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids; every id is below it."""

    @abstractmethod
    def encode(self, text: str | bytes) -> Tokens:
        """Token ids ``[tokens]`` of a text, in the smallest unsigned type that holds the vocabulary.

        Raises CorpusError for a text that the vocabulary cannot express.
        """

    @abstractmethod
    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes that ``ids`` stand for; an id outside the vocabulary becomes U+FFFD in UTF-8."""

    def decode(self, ids: ArrayLike) -> str:
        """The text that ``ids`` stand for; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def symbols_V(self) -> NDArray[np.int64] | None:
        """How many symbols each id counts in a figure per symbol ``[V]``; None where each counts one.

        A character counts where its first byte is, so the tokens of a text count its characters, however a
        character is spread over tokens and whatever part of the text they are.
        """
        return None

    def count_symbols(self, ids: ArrayLike) -> int:
        """How many symbols the tokens ``ids`` count in a figure per symbol."""
        array = integer_ids(ids)
        return array.size if self.symbols_V is None else int(self.symbols_V[array].sum())

    def save(self, directory: str | Path) -> list[Path]:
        """Write the tokenizer's files into ``directory`` and return their paths."""
        path = Path(directory) / TOKENIZER_FILE
        path.write_text(json.dumps({"kind": self.kind, **self._state()}) + "\n", encoding="ascii")
        return [path]

    def fingerprint(self) -> str:
        """The kind, and a sha256 of all that ``save`` writes: equal for tokenizers that give the same ids."""
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as directory:
            for path in self.save(directory):
                digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return f"{self.kind}:{digest.hexdigest()[:16]}"

    def _state(self) -> dict[str, Any]:
        """What the file holds beside the kind."""
        return {}

    @classmethod
    @abstractmethod
    def _load(cls, directory: Path, state: dict[str, Any]) -> Tokenizer:
        """The tokenizer that ``save`` wrote."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id of a vocabulary."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8 of a text, bytes as they are; half a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def as_text(text: str | bytes) -> str:
    """Bytes decoded as strict UTF-8; CorpusError naming the offset where they are not."""
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"the text is not UTF-8 (byte {text[error.start]:#04x} at offset {error.start} of this piece); "
            "convert it to UTF-8, or use the byte tokenizer, which takes any bytes"
        ) from error


def count_characters(data: bytes) -> int:
    """Number of UTF-8 characters: the bytes that do not continue one."""
    return int(np.count_nonzero((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80))


def integer_ids(ids: ArrayLike) -> NDArray[Any]:
    """``ids`` as a flat integer array (an empty list has no type of its own)."""
    array = np.asarray(ids).reshape(-1)
    return array if array.size else array.astype(np.int64)
