"""Load a configuration: YAML files that build on one another, then `section.key=value` overrides.

    config = load(RunConfig, "configs/quickstart.yaml", ["training.steps=100", "optimizer.lr=1e-3"])

A file may name other files it starts from (`base: other.yaml`, or a list, relative to the file);
settings are merged section by section, later ones winning. Every key is checked where it is
written, so that an error can name the file, and an unknown key names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from s2moe.options import deep_merge
from s2moe.places import find

from .options import MISSING, ConfigError, Key, Section, convert, dataclass_section
from .plain_yaml import parse_yaml, read_yaml, write_yaml
from .relevance import refuse_or_name

Config = TypeVar("Config")
BASE = "base"


def load(
    cls: type[Config], path: str | os.PathLike[str] | None, overrides: Iterable[str] = (), written: bool = False
) -> Config:
    """Read `path` (None: defaults only), apply `overrides`, check everything, build a `cls`.

    A `path` that is not there is looked for in the project: configs/quickstart.yaml is found from any directory.

    Args:
        written: by a run, which has named what changes nothing already.

    Raises:
        ConfigError: file not found or not YAML, unknown key, wrong type, missing or impossible value; an override of
            what changes nothing in this run. In a file, which runs may share, that is only named, in a warning.
    """
    section = dataclass_section(cls)
    tree = read_file(find(Path(path)), section) if path is not None else {}
    asked: dict[str, Any] = {}
    for text in overrides:
        asked = deep_merge(asked, read_override(text, section))
    config = build(section, deep_merge(tree, asked))
    refuse_or_name(config, section, {} if written else tree, asked)
    return config


def read_file(path: Path, section: Section, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a YAML file on top of those of its bases, keys checked."""
    path = Path(os.path.realpath(path)) if "\0" not in str(path) else path
    if path in seen:
        raise ConfigError(f"{path}: is its own base, by way of {', '.join(str(p) for p in seen)}")
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level, got {type(tree).__name__}")
    bases = tree.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: expected a file name or a list of them, got {bases!r}")
    check_keys(tree, section, source=f"{path}: ")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = deep_merge(merged, read_file(path.parent / base, section, (*seen, path)))
    return deep_merge(merged, tree)


def read_override(text: str, section: Section) -> dict[str, Any]:
    """The settings tree of one `section.key=value` argument; the value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"expected an override of the form section.key=value, got {text!r}")
    tree: Any = parse_yaml(value, f"{name}: the value {value!r}")
    for part in reversed(name.split(".")):
        tree = {part: tree}
    check_keys(tree, section)
    return tree


def check_keys(tree: Mapping[str, Any], section: Section, path: str = "", source: str = "") -> None:
    """Raise ConfigError at the first key that `section` does not know, naming the nearest that it does."""
    for name, value in tree.items():
        dotted = f"{path}{name}"
        known = section.keys.get(name)
        if known is None:
            raise ConfigError(f"{source}{dotted}: unknown key{_suggestion(str(name), path, section)}")
        if isinstance(known, Section):
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{source}{dotted}: a section of settings, got {value!r}")
            check_keys(value or {}, known, f"{dotted}.", source)


def build(section: Section, tree: Mapping[str, Any], path: str = "") -> Any:
    """Make the section's value from the settings in `tree`; missing keys take their defaults."""
    given: dict[str, Any] = {}
    for name, known in section.keys.items():
        dotted = f"{path}{name}"
        if isinstance(known, Section):
            given[name] = build(known, tree.get(name) or {}, f"{dotted}.")
        elif name in tree:
            given[name] = convert(tree[name], known.type, dotted)
            rule = known.limits.broken_rule(given[name])
            if rule:
                raise ConfigError(f"{dotted}: {rule}, got {given[name]!r}")
        elif known.default is MISSING:
            raise ConfigError(f"{dotted}: must be given{': ' + known.help if known.help else ''}")
    try:
        return section.build(given)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        where = f"{path.rstrip('.')}: " if path else ""
        raise ConfigError(f"{where}{error}") from error


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists and numbers, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: to_dict(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; loading it again gives an equal configuration."""
    return write_yaml(to_dict(config))


def dotted_keys(section: Section, path: str = "") -> Iterator[tuple[str, Key]]:
    """Every key of a section tree with its full dotted name."""
    for name, known in section.keys.items():
        if isinstance(known, Section):
            yield from dotted_keys(known, f"{path}{name}.")
        else:
            yield f"{path}{name}", known


def _suggestion(name: str, path: str, section: Section) -> str:
    nearest = difflib.get_close_matches(name, section.keys, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {path}{nearest[0]}?"
    everywhere = [dotted for dotted, _ in dotted_keys(section, path)]
    same_name = [dotted for dotted in everywhere if dotted.rsplit(".", 1)[-1] == name]
    nearest = same_name or difflib.get_close_matches(f"{path}{name}", everywhere, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return f"; known here: {', '.join(section.keys)}"
