"""Declaring options: a dataclass field with its explanation and its allowed values."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def option(default: Any = MISSING, help: str = "", choices: tuple[str, ...] = (), factory: Any = MISSING) -> Any:
    """A dataclass field that ``--help`` can explain and the configuration loader can check."""
    metadata = {"help": help, "choices": choices}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)
