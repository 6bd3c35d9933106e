"""The tokenizer of the weights that are fine-tuned: this project's, or the one that an upcycled model came with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s2moe.config import ConfigError
from s2moe.data import Corpus
from s2moe.data.encoding import Keep
from s2moe.data.tokenizer_base import Tokens
from s2moe.hub.auto_tokenizer import has_tokenizer, read_tokenizer
from s2moe.hub.tokenization import FINGERPRINT, S2MoETokenizer, make_expressible
from s2moe.training.weights import Weights

CUT_SIDE: dict[Keep, str] = {"first": "right", "last": "left"}  # as transformers puts it


class TheirTokenizer:
    """A tokenizer of transformers, with the special tokens that it puts around a text."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.kind = base.init_kwargs.get(FINGERPRINT, type(base).__name__).partition(":")[0]

    def encode_within(self, texts: Sequence[str], length: int, keep: Keep) -> list[Tokens]:
        """Of each text token ids [tokens], at most ``length``: all special tokens, and the first or last of its own.

        Raises:
            ConfigError: the special tokens alone take ``length``.
        """
        special = self.base.num_special_tokens_to_add()
        if length <= special:
            raise ConfigError(f"data.input_length: {self.kind} puts {special} tokens around a text, got {length}")
        self.base.truncation_side = CUT_SIDE[keep]
        encoded = self.base(list(texts), truncation=True, max_length=length)["input_ids"]
        return [np.asarray(ids, dtype=np.uint32) for ids in encoded]


def tokenizer_of(weights: Weights) -> TheirTokenizer:
    """The tokenizer that the weights were pre-trained with; of this project's, one that brings any text into its words.

    Raises:
        CorpusError, ConfigError: it is not to be found, or cannot be read.
    """
    if weights.hf is None:
        assert weights.checkpoint is not None
        return TheirTokenizer(
            S2MoETokenizer(Corpus.open(weights.checkpoint.state.config["data"]["dir"]).tokenizer, expressible=True)
        )
    if not has_tokenizer(weights.hf):
        raise ConfigError(f"{weights.hf} has no tokenizer: export the model again, with --data")
    base = read_tokenizer(weights.hf)
    make_expressible(base)
    return TheirTokenizer(base)


def save_for_auto(tokenizer: TheirTokenizer, directory: Path, max_length: int, keep: Keep = "first") -> None:
    """Write it for a classifier so that ``AutoTokenizer`` finds it and, with ``truncation=True``, encodes as
    ``encode_text`` does. It pads on the right, where padding changes no model's positions.
    """
    settings = {"truncation_side": CUT_SIDE[keep], "padding_side": "right"}
    base = tokenizer.base
    base.model_max_length = max_length
    for name, value in settings.items():
        setattr(base, name, value)
    base.init_kwargs |= settings  # only what is named here is saved
    if base.pad_token is None and base.eos_token is not None:
        base.pad_token = base.eos_token  # any token will do: the attention mask says what is padding
    base.save_pretrained(directory)
