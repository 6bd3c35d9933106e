"""Texts with a class as batches: the tokens of pre-training, cut to length, padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from s2moe.data.classification import Examples
from s2moe.data.errors import CorpusError
from s2moe.data.library import expressing
from s2moe.data.tokenizer_base import Tokenizer, Tokens

Keep = Literal["first", "last"]
ENCODED_AT_ONCE = 256  # texts that the library encodes side by side; its own records of tokens take much memory


class CuttingEncoder(Protocol):
    """A tokenizer that puts tokens around a text, and so has to cut long texts itself."""

    @property
    def kind(self) -> str:
        """Its name, for people."""

    def encode_within(self, texts: Sequence[str], length: int, keep: Keep) -> list[Tokens]:
        """Of each text token ids [tokens], at most ``length``: those around it, and the first or last of its own."""


Encoder = Tokenizer | CuttingEncoder


class EncodedTexts(Dataset):
    """Token ids and class of each text, as a Trainer takes them.

    Args:
        length: most tokens of a text.
        keep: which of a longer text's tokens remain.
    """

    def __init__(self, examples: Examples, tokenizer: Encoder, length: int, keep: Keep = "first") -> None:
        self.labels = examples.labels
        self.tokens = encode_texts(tokenizer, examples.texts, length, keep)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def encode_text(tokenizer: Encoder, text: str, length: int, keep: Keep = "first") -> torch.Tensor:
    """A text's token ids [tokens], at most ``length`` of them.

    Raises:
        CorpusError: if nothing is left of it in this vocabulary.
    """
    return encode_texts(tokenizer, [text], length, keep)[0]


def encode_texts(tokenizer: Encoder, texts: Sequence[str], length: int, keep: Keep = "first") -> list[torch.Tensor]:
    """``encode_text`` of each text."""
    encoded: list[torch.Tensor] = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        some = texts[start : start + ENCODED_AT_ONCE]
        if isinstance(tokenizer, Tokenizer):
            whole = (tokenizer.encode(expressible(tokenizer, text)) for text in some)
            cut = [ids[:length] if keep == "first" else ids[-length:] for ids in whole]
        else:
            cut = tokenizer.encode_within(some, length, keep)
        for text, ids in zip(some, cut, strict=True):
            if len(ids) == 0:
                raise CorpusError(f"the text {text[:60]!r} has no token in this {tokenizer.kind} vocabulary")
            encoded.append(torch.from_numpy(ids.astype(np.int64)))
    return encoded


def expressible(tokenizer: Tokenizer, text: str) -> str:
    """The text in what the vocabulary has: see ``expressing``."""
    change = expressing(tokenizer)
    return text if change is None else change.normalize_str(text)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right: input_ids and attention_mask [B, S], labels [B].

    Padding has id 0; the mask alone says that it is padding.
    """
    tokens = [row["input_ids"] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(row) for row in tokens])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}
