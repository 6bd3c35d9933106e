"""YAML as people read it: plain settings, each key once, and numbers that look like numbers.

PyYAML's safe loader reads YAML 1.1, where a second `training:` silently replaces the first, 0100 is 64, 1:30 is 90,
1e-3 is text and 2026-11-30 a date. Here a key that is given twice is an error; whole numbers are decimal, so that 0100
is 100; 1e-3 is a number; everything else that is not true, false (yes, no, on, off) or null is text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .options import ConfigError

DEPTH = 50  # of nested lists and sections
VALUES = 10_000  # of a file with aliases, each counted as what it stands for: ten lines can stand for 10^9 values
WHOLE = r"[-+]?[0-9]+(?:_[0-9]+)*"
NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(f"{WHOLE}$"),
    "tag:yaml.org,2002:float": re.compile(
        rf"(?:(?:{WHOLE}(?:\.[0-9]*)?|[-+]?\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
KEPT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")  # as YAML 1.1 has them


class PlainLoader(yaml.SafeLoader):
    """Reads plain settings only. Raises YAMLError, with the line, at whatever else is there."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._open: list[str | None] = []  # anchors of the nodes that are being read
        self._values = 0  # read so far, aliases written out
        self._sizes: dict[str | None, int] = {}  # of the nodes with an anchor, likewise

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                raise _error(f"*{event.anchor} contains itself", event)
            self._values += self._sizes.get(event.anchor, 0)
            if self._values > VALUES:
                raise _error(f"aliases make it more than {VALUES} values: write out what is meant", event)
            return super().compose_node(parent, index)
        if event.tag not in (None, "!"):
            raise _error(f"the tag {event.tag!r} is not read: write the plain value", event)
        if len(self._open) >= DEPTH:
            raise _error(f"nested more than {DEPTH} levels deep", event)
        before = self._values
        self._values += 1
        self._open.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        if event.anchor is not None:
            self._sizes[event.anchor] = self._values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a name", key)
            if key.value in seen:
                raise _error(f"{key.value!r} is given twice, first in line {seen[key.value]}", key)
            seen[key.value] = key.start_mark.line + 1
        return node

    def number(self, node: Any) -> int | float:
        """A decimal number."""
        text = node.value.replace("_", "")
        try:
            return int(text) if node.tag.endswith(":int") else float(re.sub(r"\.(?=[inIN])", "", text))
        except ValueError as error:  # of more digits than Python reads
            raise _error(f"{node.value[:20]}... is too long a number", node) from error


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class PlainDumper(yaml.SafeDumper):
    """Quotes text that PlainLoader, or another reader of YAML, would take for something else."""


for tag, pattern in NUMBERS.items():
    PlainLoader.add_constructor(tag, PlainLoader.number)
    for side in (PlainLoader, PlainDumper):
        side.add_implicit_resolver(tag, pattern, list("-+0123456789."))


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, place.start_mark)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: it is not plain YAML; the message, of one line, begins with `name` and has the line's number.
    """
    try:
        return yaml.load(text, PlainLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}" if mark is not None else name
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error


def write_yaml(value: Any) -> str:
    """Plain lists, dictionaries, numbers and text as YAML that `parse_yaml` reads as the same."""
    text: str = yaml.dump(value, Dumper=PlainDumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        ConfigError: it cannot be read or is not plain YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}") from error
    return parse_yaml(text, str(path))
