"""Declaring settings: a dataclass field with its meaning and its allowed values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field
from typing import Any


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    factory: Any = MISSING,
    section: Any = None,
) -> Any:
    """Declare a dataclass field that is a setting.

    Args:
        default: value when nothing is given; without one (and without ``factory``) the key is required.
        help: one sentence for ``--help``, with the unit where there is one.
        choices: the allowed values, if they are names.
        factory: makes a mutable default.
        section: the keys of this field, where they do not come from a dataclass annotation.
    """
    metadata = {"help": help, "choices": choices, "section": section}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def nearest(name: object, known: Iterable[str]) -> str:
    """', did you mean …?' with the known name most like ``name``, or nothing."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, section by section; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged
