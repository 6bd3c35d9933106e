"""The tokenizer of the weights that are fine-tuned: this project's, or the one that an upcycled model came with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from s2moe.config import ConfigError
from s2moe.data import Corpus, Tokenizer, load_tokenizer
from s2moe.data.tokenizer_base import TOKENIZER_FILE, Tokens
from s2moe.hub.tokenization import save_tokenizer
from s2moe.training.weights import Weights


class TheirTokenizer:
    """A tokenizer of transformers, with the special tokens that it puts around a text."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.kind = type(base).__name__

    def encode(self, text: str) -> Tokens:
        """Token ids [tokens]."""
        return np.asarray(self.base(text, verbose=False)["input_ids"], dtype=np.uint32)


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
    try:
        return TheirTokenizer(AutoTokenizer.from_pretrained(weights.hf))
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer in {weights.hf} cannot be read: {error}") from error


def save_for_auto(tokenizer: Tokenizer | TheirTokenizer, directory: Path, max_length: int) -> None:
    """Write it so that ``AutoTokenizer`` finds it; ``truncation=True`` then cuts at ``max_length`` tokens."""
    if isinstance(tokenizer, TheirTokenizer):
        tokenizer.base.model_max_length = max_length
        tokenizer.base.save_pretrained(directory)
    else:
        save_tokenizer(tokenizer, directory, max_length)
