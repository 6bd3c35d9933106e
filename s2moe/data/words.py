"""Word-level tokens as WikiText-103's published perplexities count them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from s2moe.data.errors import CorpusError
from s2moe.data.tokenizer_base import Tokenizer, Tokens, as_text, integer_ids, token_dtype

EOS = "<eos>"
UNKNOWN = "<unk>"
VOCABULARY_FILE = "vocabulary.txt"


class WordTokenizer(Tokenizer):
    """Words between white space, and one <eos> for each line, empty ones included.

    Ids are sorted by frequency, <eos> first. A word that training never saw is <unk>, so decoding gives
    back the words of the vocabulary with single spaces, not the exact text. Symbols are the tokens: a
    figure per symbol is per word, the convention of WikiText-103 perplexity.
    """

    kind = "word"
    symbol = "word"
    cut = "line"

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words) or EOS not in self._ids or UNKNOWN not in self._ids:
            raise CorpusError(f"a word vocabulary needs {EOS} and {UNKNOWN} and every word once")

    @classmethod
    def from_texts(cls, texts: Iterable[str | bytes]) -> WordTokenizer:
        """The vocabulary of the training text, given in pieces cut at line ends, most frequent first."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(as_text(text).split())
        special = [EOS] if UNKNOWN in counts else [EOS, UNKNOWN]
        del counts[EOS]
        return cls([*special, *(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])))])

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str | bytes) -> Tokens:
        lines = as_text(text).split("\n")
        if not lines[-1]:
            lines.pop()
        look_up, unknown = self._ids.get, self._ids[UNKNOWN]
        ids = [look_up(word, unknown) for line in lines for word in (*line.split(), EOS)]
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        count = self.vocab_size
        words = (self.words[i] if 0 <= i < count else UNKNOWN for i in integer_ids(ids).tolist())
        text = " ".join("\n" if word == EOS else word for word in words)
        return re.sub(" ?\n ?", "\n", text).encode()

    def save(self, directory: str | Path) -> list[Path]:
        path = Path(directory) / VOCABULARY_FILE
        path.write_text("\n".join(self.words) + "\n", encoding="utf-8")
        return [*super().save(directory), path]

    @classmethod
    def _load(cls, directory: Path, state: dict[str, Any]) -> WordTokenizer:
        return cls((directory / VOCABULARY_FILE).read_text(encoding="utf-8").rstrip("\n").split("\n"))
