"""Declaring settings: a dataclass field with its meaning, its allowed values, and where it matters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, NamedTuple

LARGEST = 2**20  # dimension of a matrix: three of them multiply to a number of bytes that 64 bits hold
TECHNICAL = 1000  # limits from here on are the machine's: who asks for -1 need not hear of them
MOST = 10**12  # of a whole number that has no other limit: more is a slip, and no product of two overflows a float


class Limits(NamedTuple):
    """The numbers that a setting may have: always finite, and between these. None: no limit on that side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def broken_rule(self, value: Any) -> str:
        """The rule that a number, or one of a list of numbers, breaks, such as 'must be at least 1'; empty if none."""
        if isinstance(value, (list, tuple)):
            return next(filter(None, map(self.broken_rule, value)), "")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        high = (self.most is None or value <= self.most) and (self.below is None or value < self.below)
        if not (low and high):
            return self._rule(low)
        return f"must lie between -{MOST} and {MOST}" if isinstance(value, int) and abs(value) > MOST else ""

    def _rule(self, low_enough: bool) -> str:
        low = self.above if self.least is None else self.least
        high = self.below if self.most is None else self.most
        if low is not None and high is not None and high < TECHNICAL:
            brackets = "(" if self.least is None else "[", ")" if self.most is None else "]"
            return f"must lie in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
        if low_enough:
            return f"must be below {high}" if self.most is None else f"must be at most {high}"
        if low == 0:
            return "must be positive" if self.least is None else "must not be negative"
        return f"must be above {low:g}" if self.least is None else f"must be at least {low:g}"


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    needs: str = "",
    factory: Any = MISSING,
    section: Any = None,
) -> Any:
    """Declare a dataclass field that is a setting.

    Args:
        default: value when nothing is given; without one (and without ``factory``) the key is required.
        help: one sentence for ``--help``, with the unit where there is one.
        choices: the allowed values, if they are names.
        least, above, most, below: what a number (each number of a list) is at least, above, at most, below. All
            numbers are finite.
        needs: where the setting matters, see ``holds``. Given where it does not, it is refused or named.
        factory: makes a mutable default.
        section: the keys of this field, where they do not come from a dataclass annotation.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "limits": Limits(least, above, most, below),
        "needs": needs,
        "section": section,
    }
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def holds(needs: str, value_of: Callable[[str], Any]) -> bool:
    """Whether a condition on other settings holds.

    Conditions are joined by `` or ``. One is ``name`` (it is on: neither null nor false, 0 or empty), ``not name``,
    ``name=a|b`` or ``name!=a|b``, where the values are as they are written in YAML. An empty one holds.
    """
    return not needs or any(_holds(condition, value_of) for condition in needs.split(" or "))


def _holds(condition: str, value_of: Callable[[str], Any]) -> bool:
    name, equals, values = condition.partition("=")
    if not equals:
        return not value_of(name[4:]) if name.startswith("not ") else bool(value_of(name))
    differs = name.endswith("!")
    return (written(value_of(name.removesuffix("!"))) in values.split("|")) != differs


def needed_names(needs: str) -> list[str]:
    """The settings that a condition is about."""
    conditions = needs.split(" or ") if needs else []
    return [condition.removeprefix("not ").partition("=")[0].removesuffix("!") for condition in conditions]


def written(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_fields(settings: Any) -> None:
    """Every field of a dataclass of options is as it is declared.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    for item in fields(settings):
        value, choices = getattr(settings, item.name), item.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise ValueError(
                f"{item.name}: must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}"
            )
        rule = item.metadata["limits"].broken_rule(value) if "limits" in item.metadata else ""
        if rule:
            raise ValueError(f"{item.name} {rule}, got {value!r}")


class Checked:
    """Base of options that are checked where they are made, see ``check_fields``."""

    def __post_init__(self) -> None:
        check_fields(self)


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
