"""The unit of a figure per symbol, and the one division that makes it.

What a symbol is, the corpus' tokenizer says: a byte, a character or a word. Keys of files and logs are called `bpc`
whatever it is, since they were first so; beside them, and in all that people read, stands the unit.
"""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from s2moe.data.corpus import CorpusMetadata
from s2moe.data.errors import CorpusError
from s2moe.data.tokenizers import load_tokenizer

UNKNOWN_SYMBOL = "symbol"


def bits_per_symbol(nats: float, symbols: float) -> float:
    """A negative log-likelihood in nats as bits per symbol."""
    return nats / (math.log(2) * symbols)


def unit_of(symbol: str) -> str:
    """For people: what a figure per `symbol` is in."""
    return f"bits per {symbol}"


def symbol_of_run(run: Path, hf: str = "hf") -> str:
    """The symbol of a run's figures, as its exported tokenizer says, or its corpus; "symbol" where both are gone."""
    try:
        return load_tokenizer(run / hf).symbol
    except CorpusError:
        pass
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return CorpusMetadata.read(Path(settings["data"]["dir"])).symbol
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return UNKNOWN_SYMBOL
