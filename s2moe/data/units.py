"""The unit of a figure per symbol, and the one division that makes it.

What a symbol is, the corpus' tokenizer says: a byte, a character or a word. Keys of files and logs are called `bpc`
whatever it is, since they were first so; beside them, and in all that people read, stands the unit.
"""

from __future__ import annotations

import math

UNKNOWN_SYMBOL = "symbol"


def bits_per_symbol(nats: float, symbols: float) -> float:
    """A negative log-likelihood in nats as bits per symbol."""
    return nats / (math.log(2) * symbols)


def unit_of(symbol: str) -> str:
    """For people: what a figure per `symbol` is in."""
    return f"bits per {symbol}"
