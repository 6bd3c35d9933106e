"""The tokenizer of a Hugging Face directory, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from s2moe.config import ConfigError
from s2moe.data.tokenizer_base import TOKENIZER_FILE


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a tokenizer, be it one that an earlier version of this project wrote."""
    return any((directory / name).is_file() for name in ("tokenizer_config.json", TOKENIZER_FILE))


def read_tokenizer(directory: Path) -> Any:
    """One of transformers' tokenizers.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # files that are not what they should be end in errors of any kind
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the tokenizer in {directory} cannot be read ({reason})") from error
