"""Checks that a vision model's configuration makes of its own fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from s2moe.options import nearest


def check_choices(config: Any) -> None:
    """Every field declared with ``choices`` has one of them.

    Raises:
        ValueError: naming the field, the known values and the nearest one.
    """
    for item in dataclasses.fields(config):
        known, value = item.metadata.get("choices"), getattr(config, item.name)
        if known and value not in known:
            raise ValueError(f"{item.name}: must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Each of these numbers is at least so large, or null.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")
