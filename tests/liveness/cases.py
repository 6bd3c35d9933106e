"""For each setting another legal value, and the settings under which it matters: both from its declaration."""

from __future__ import annotations

import typing
from typing import Any

from s2moe.config.options import Key, Section
from s2moe.config.relevance import Settings
from s2moe.options import Limits

Tree = dict[str, Any]  # values by dotted names
FACTS: dict[str, Tree] = {"SMoE layers": {}, "dense layers": {"model.moe.first_dense": 1}}


def others(known: Key) -> list[Any]:
    """Other legal values of a setting: every choice, the flipped flag, another number."""
    hint, default, limits = known.type, known.default, known.limits
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [choice for choice in arguments if choice != default]
    choices = [choice for part in arguments for choice in typing.get_args(part) if typing.get_origin(part)]
    if choices and all(isinstance(choice, str) for choice in choices):
        return [choice for choice in choices if choice != default]
    if bool in (hint, *arguments):
        return [not default] if isinstance(default, bool) else [True, False]
    if float in (hint, *arguments):
        tried = [default / 2] if isinstance(default, (int, float)) and default else [0.37, 1.5]
        return [next(value for value in (*tried, 0.37, 1.5) if not limits.broken_rule(value))]
    if int in (hint, *arguments):
        tried = [default + 1, default // 2] if isinstance(default, int) and not isinstance(default, bool) else [2]
        tried = tried if not isinstance(default, int) or default < 4 else tried[::-1]
        return [next(value for value in tried if value != default and not limits.broken_rule(value))]
    return ["other"] if str in (hint, *arguments) else []


def on(known: Key) -> Any:
    """A value of a setting that is neither null nor false, 0 or empty."""
    if known.default and known.default is not ...:
        return known.default
    return next(value for value in others(known) if value)


def context(settings: Settings, path: tuple[str, ...]) -> Tree:
    """The settings under which the one at `path` matters, by the conditions of itself and of what holds it."""
    found: Tree = {}
    for depth in range(1, len(path) + 1):
        known = at(settings, path[:depth])
        for condition in known.needs.split(" or ")[:1]:
            if not condition:
                continue
            negated = condition.startswith("not ")
            name, _, values = condition.removeprefix("not ").partition("=")
            place = partner(settings, name.removesuffix("!"), path[: depth - 1])
            if place == path:
                continue
            if name in FACTS:
                found |= FACTS[name]
                continue
            key = at(settings, place)
            assert isinstance(key, Key)
            value: Any = values.split("|")[0]
            if name.endswith("!"):
                value = next(value for value in [key.default, *others(key)] if value not in values.split("|"))
            elif not values:
                value = type(key.default)() if negated and key.default is not None else None if negated else on(key)
            found |= context(settings, place) | {".".join(place): value}
    return found


def partner(settings: Settings, name: str, holder: tuple[str, ...]) -> tuple[str, ...]:
    """The path of the setting that a condition in a section names."""
    own = (*holder, *name.split("."))
    return own if at(settings, own) is not None else tuple(name.split("."))


def at(settings: Settings, path: tuple[str, ...]) -> Any:
    """The setting or section at a path, or None."""
    found: Any = settings.section
    for part in path:
        found = found.keys.get(part) if isinstance(found, Section) else None
    return found


def leaves(section: Section, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Key]]:
    """Every setting of a tree of sections with its path."""
    found = []
    for name, known in section.keys.items():
        if isinstance(known, Section):
            found += leaves(known, (*path, name))
        else:
            found.append(((*path, name), known))
    return found


def outside(limits: Limits, whole: bool) -> list[Any]:
    """Numbers that a setting may not have."""
    found: list[Any] = [] if whole else [float("nan"), float("inf"), -float("inf")]
    low = limits.least if limits.least is not None else limits.above
    high = limits.most if limits.most is not None else limits.below
    if low is not None:
        found.append(low - 1)
    if high is not None:
        found.append(high + 1)
    return [*found, 10**30] if whole else found


def nested(values: Tree) -> Tree:
    """The tree of dotted names."""
    tree: Tree = {}
    for key, value in values.items():
        *path, last = key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree
