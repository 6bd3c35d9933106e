"""Texts with a class as batches: the tokens of pre-training, cut to length, padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from s2moe.data.classification import Examples
from s2moe.data.errors import CorpusError
from s2moe.data.tokenizer_base import Tokenizer, Tokens
from s2moe.data.tokenizers import TEXT8_ALPHABET, CharacterTokenizer

Keep = Literal["first", "last"]
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class CuttingEncoder(Protocol):
    """A tokenizer that puts tokens around a text, and so has to cut long texts itself."""

    @property
    def kind(self) -> str:
        """Its name, for people."""

    def encode_within(self, text: str, length: int, keep: Keep) -> Tokens:
        """Token ids [tokens], at most ``length``: the tokens around, and the first or last of the text's own."""


Encoder = Tokenizer | CuttingEncoder


class EncodedTexts(Dataset):
    """Token ids and class of each text, as a Trainer takes them.

    Args:
        length: most tokens of a text.
        keep: which of a longer text's tokens remain.
    """

    def __init__(self, examples: Examples, tokenizer: Encoder, length: int, keep: Keep = "first") -> None:
        self.labels = examples.labels
        self.tokens = [encode_text(tokenizer, text, length, keep) for text in examples.texts]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def encode_text(tokenizer: Encoder, text: str, length: int, keep: Keep = "first") -> torch.Tensor:
    """A text's token ids [tokens], at most ``length`` of them.

    Raises:
        CorpusError: if nothing is left of it in this vocabulary.
    """
    if isinstance(tokenizer, Tokenizer):
        ids = tokenizer.encode(expressible(tokenizer, text))
        ids = ids[:length] if keep == "first" else ids[-length:]
    else:
        ids = tokenizer.encode_within(text, length, keep)
    if len(ids) == 0:
        raise CorpusError(f"the text {text[:60]!r} has no token in this {tokenizer.kind} vocabulary")
    return torch.from_numpy(ids.astype(np.int64))


def expressible(tokenizer: Tokenizer, text: str) -> str:
    """The text in the characters that the vocabulary has.

    text8's 27 are reached as its authors did: lower case, digits spelt out, all else a space, never two. Of another
    alphabet the characters that it lacks are left out.
    """
    if not isinstance(tokenizer, CharacterTokenizer):
        return text
    if set(tokenizer.alphabet) == set(TEXT8_ALPHABET):
        spelt = "".join(f" {_DIGITS[int(c)]} " if c in "0123456789" else c for c in text.lower())
        return " ".join("".join(c if c in TEXT8_ALPHABET else " " for c in spelt).split())
    return "".join(character for character in text if character in tokenizer.alphabet)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right: input_ids and attention_mask [B, S], labels [B].

    Padding has id 0; the mask alone says that it is padding.
    """
    tokens = [row["input_ids"] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(row) for row in tokens])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}
