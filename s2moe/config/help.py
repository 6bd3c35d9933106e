"""The text that `--help` prints: every key with its type, default and meaning, section by section."""

from __future__ import annotations

import textwrap
from typing import Any

from .options import MISSING, Key, Section, dataclass_section, type_name

WIDTH = 110


def help_text(cls: type) -> str:
    """All settings of a configuration class as aligned plain text."""
    return "\n".join(_section_lines(dataclass_section(cls), "")) + "\n"


def section_text(section: Section, name: str, help: str = "") -> str:
    """The settings of one section, under its name."""
    return "\n".join(_section_lines(Section(section.keys, section.build, help), f"{name}.")) + "\n"


def _section_lines(section: Section, path: str) -> list[str]:
    lines = []
    if path:
        lines += ["", f"{path.rstrip('.')}" + (f"  ({section.help})" if section.help else "")]
    for name, known in section.keys.items():
        if isinstance(known, Key):
            lines += _key_lines(f"{path}{name}", known)
    for name, known in section.keys.items():
        if isinstance(known, Section):
            lines += _section_lines(known, f"{path}{name}.")
    return lines


def _key_lines(name: str, key: Key) -> list[str]:
    default = "required" if key.default is MISSING else f"default {_show(key.default)}"
    head = f"  {name} = {type_name(key.type)}; {default}"
    help = " ".join(filter(None, (key.help, f"(only with {key.needs})" if key.needs else "")))
    if not help:
        return textwrap.wrap(head, WIDTH, subsequent_indent=" " * 6)
    return textwrap.wrap(head, WIDTH, subsequent_indent=" " * 6) + textwrap.wrap(
        help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
    )


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    return repr(value) if value == "" else str(value)
