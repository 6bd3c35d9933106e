"""The tokenizer of the weights that are fine-tuned: this project's, or the one that an upcycled model came with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from s2moe.config import ConfigError
from s2moe.data import Corpus, Tokenizer, load_tokenizer
from s2moe.data.encoding import Keep
from s2moe.data.tokenizer_base import TOKENIZER_FILE, Tokens
from s2moe.hub.auto_tokenizer import read_tokenizer
from s2moe.hub.tokenization import save_tokenizer
from s2moe.training.weights import Weights

CUT_SIDE: dict[Keep, str] = {"first": "right", "last": "left"}  # as transformers puts it


class TheirTokenizer:
    """A tokenizer of transformers, with the special tokens that it puts around a text."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.kind = type(base).__name__

    def encode_within(self, text: str, length: int, keep: Keep) -> Tokens:
        """Token ids [tokens], at most ``length``: all special tokens, and the first or last of the text's own.

        Raises:
            ConfigError: the special tokens alone take ``length``.
        """
        special = self.base.num_special_tokens_to_add()
        if length <= special:
            raise ConfigError(f"data.input_length: {self.kind} puts {special} tokens around a text, got {length}")
        self.base.truncation_side = CUT_SIDE[keep]
        ids = self.base(text, truncation=True, max_length=length)["input_ids"]
        return np.asarray(ids, dtype=np.uint32)


def tokenizer_of(weights: Weights) -> Tokenizer | TheirTokenizer:
    """The tokenizer that the weights were pre-trained with.

    Raises:
        CorpusError, ConfigError: it is not to be found, or cannot be read.
    """
    if weights.hf is None:
        assert weights.checkpoint is not None
        return Corpus.open(weights.checkpoint.state.config["data"]["dir"]).tokenizer
    if (weights.hf / TOKENIZER_FILE).is_file() or not (weights.hf / "tokenizer_config.json").is_file():
        return load_tokenizer(weights.hf)
    return TheirTokenizer(read_tokenizer(weights.hf))


def save_for_auto(
    tokenizer: Tokenizer | TheirTokenizer, directory: Path, max_length: int, keep: Keep = "first"
) -> None:
    """Write it for a classifier so that ``AutoTokenizer`` finds it and, with ``truncation=True``, encodes as
    ``encode_text`` does. It pads on the right, where padding changes no model's positions.
    """
    settings = {"truncation_side": CUT_SIDE[keep], "padding_side": "right"}
    if not isinstance(tokenizer, TheirTokenizer):
        return save_tokenizer(tokenizer, directory, max_length, expressible=True, **settings)
    base = tokenizer.base
    base.model_max_length = max_length
    for name, value in settings.items():
        setattr(base, name, value)
    base.init_kwargs |= settings  # only what is named here is saved
    if base.pad_token is None and base.eos_token is not None:
        base.pad_token = base.eos_token  # any token will do: the attention mask says what is padding
    base.save_pretrained(directory)
