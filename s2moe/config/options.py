"""What a configuration may contain: a tree of typed keys, read from dataclasses.

A run's settings are dataclasses whose fields are declared with `option`. `dataclass_section` turns
such a class into a `Section`, the one description that loading, overriding, checking and `--help`
all read. A part whose values are built in another way (the model, whose class belongs to
transformers) supplies its own `Section`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from s2moe.options import Limits


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or impossible. Its message is meant for the user."""


@dataclass(frozen=True)
class Key:
    """One setting: its type, its default (`MISSING` when it must be given), its meaning, and see `option`."""

    type: Any
    default: Any
    help: str = ""
    limits: Limits = Limits()
    needs: str = ""

    @staticmethod
    def of(item: dataclasses.Field, type: Any, help: str) -> Key:
        """The setting that a field declares."""
        declared = item.metadata
        return Key(type, default_of(item), help, declared.get("limits", Limits()), declared.get("needs", ""))


@dataclass(frozen=True)
class Section:
    """Named keys and sections, and how to make the section's value from the settings that were given.

    `build` receives only the given keys, already checked; it raises ValueError for values that are
    each well-typed but impossible together. All keys matter only where `needs` holds, see `option`; those that it
    names, in the section itself, always do.
    """

    keys: Mapping[str, Key | Section]
    build: Callable[[dict[str, Any]], Any]
    help: str = ""
    needs: str = ""


def dataclass_section(cls: type, help: str = "", needs: str = "") -> Section:
    """The section described by a dataclass: nested dataclasses become nested sections."""
    return _section(cls, help, needs)


@functools.cache  # evaluating a class's annotations takes most of the time of reading settings
def _section(cls: type, help: str, needs: str) -> Section:
    hints = typing.get_type_hints(cls)
    keys: dict[str, Key | Section] = {}
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        text = item.metadata.get("help", "")
        explicit = item.metadata.get("section")
        if explicit is not None:
            keys[item.name] = explicit
        elif dataclasses.is_dataclass(hints[item.name]):
            keys[item.name] = dataclass_section(hints[item.name], text, item.metadata.get("needs", ""))
        else:
            keys[item.name] = Key.of(item, hint_of(item, hints), text)
    return Section(keys, lambda given: cls(**given), help, needs)


def open_section(cls: type, build: Callable[[dict[str, Any]], Any], help: str = "") -> Section:
    """The keys of a dataclass, of which only the given ones reach `build`, nested sections as dicts.

    For values whose defaults depend on one another, such as the settings of a named method.
    """
    hints = typing.get_type_hints(cls)
    keys = dict(dataclass_section(cls).keys)
    for name, known in keys.items():
        if isinstance(known, Section):
            keys[name] = dataclasses.replace(open_section(hints[name], dict, known.help), needs=known.needs)
    return Section(keys, build, help)


def hint_of(item: dataclasses.Field, hints: dict[str, Any]) -> Any:
    """The type of a field: its choices, or null where it may be, or as it is annotated."""
    choices = item.metadata.get("choices")
    if not choices:
        return hints[item.name]
    named: Any = Literal[tuple(choices)]
    return named | None if type(None) in typing.get_args(hints[item.name]) else named


def default_of(item: dataclasses.Field) -> Any:
    """The default value of a dataclass field, or `MISSING`."""
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else MISSING


def convert(value: Any, expected: Any, path: str) -> Any:
    """Check `value` against the type `expected` and return it, integers becoming floats where asked.

    Raises:
        ConfigError: naming `path`, the expected type and the value.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for candidate in arguments:
            try:
                return convert(value, candidate, path)
            except ConfigError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _convert_sequence(value, origin, arguments, path)
    elif (origin or expected) is dict and isinstance(value, Mapping):
        return dict(value)
    elif expected is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:  # a whole number beyond all floats
                return math.inf
    elif expected is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(expected, type) and isinstance(value, expected):
        return value
    hint = "; text that looks like something else is quoted" if expected is str and value is not None else ""
    raise ConfigError(f"{path}: expected {type_name(expected)}, got {value!r}{hint}")


def _convert_sequence(value: Any, origin: type, arguments: tuple[Any, ...], path: str) -> Any:
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{path}: expected {len(arguments)} values, got {list(value)!r}")
        return tuple(convert(v, t, f"{path}[{i}]") for i, (v, t) in enumerate(zip(value, arguments, strict=True)))
    element = arguments[0] if arguments else Any
    return origin(convert(v, element, f"{path}[{i}]") for i, v in enumerate(value))


def type_name(expected: Any) -> str:
    """A type as a user would write it: `int`, `float or null`, `one of cosine, constant`."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (list, tuple):
        inner = ", ".join(type_name(a) for a in arguments if a is not Ellipsis)
        return f"list of {inner}" if inner else "list"
    if expected is type(None):
        return "null"
    return getattr(origin or expected, "__name__", str(expected))
