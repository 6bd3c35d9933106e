"""Which of the given settings change nothing in a run, since what they belong to is off: see `option`'s `needs`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from s2moe.options import holds, needed_names, written

from .options import ConfigError, Key, Section

Path = tuple[str, ...]


def refuse_or_name(config: Any, section: Section, tree: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse what was asked for this run alone and cannot matter in it; name what a file says so, in one warning.

    A key that has its default's value is passed over: it would change nothing anyway.

    Args:
        config: built from both; `described()` gives its sections and values, where it has choices that decide them.
        tree, asked: the settings of files, and those of overrides.

    Raises:
        ConfigError: an override cannot matter.
    """
    settings = Settings.of(config, section)
    for path in settings.without_effect(asked):
        raise ConfigError(f"{'.'.join(path)}: {settings.reason(path)}: leave it out, or change that")
    idle = [f"{'.'.join(path)} ({settings.reason(path)})" for path in settings.without_effect(tree)]
    if idle and all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        print(f"warning: without effect in this run: {', '.join(idle)}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """The sections and values of a configuration, all choices made, and facts that follow from them, by name."""

    section: Section
    values: Mapping[str, Any]
    facts: Mapping[str, bool]

    @staticmethod
    def of(config: Any, section: Section) -> Settings:
        """Those of a configuration; its class may say more of them than its fields do."""
        from .loader import to_dict

        return config.described() if hasattr(config, "described") else Settings(section, to_dict(config), {})

    def without_effect(self, given: Mapping[str, Any]) -> Iterator[Path]:
        """The keys of a tree of settings that change nothing."""
        for path in _leaves(given, self.section):
            known = self._known(path)
            if isinstance(known, Key) and self.reason(path) and self._value(path) != known.default:
                yield path

    def reason(self, path: Path) -> str:
        """Why a key changes nothing; empty where it matters."""
        for depth in range(1, len(path) + 1):
            known, holder = self._known(path[:depth]), path[: depth - 1]
            if known is None or not known.needs:
                continue
            partners = [self._path(name, holder) for name in needed_names(known.needs)]
            if path in partners:
                continue
            conditions = known.needs.split(" or ")
            on = [holds(condition, partial(self._get, holder)) for condition in conditions]
            if not any(on):
                return self._told(conditions, partners)
            reasons = [self.reason(partner) for partner, held in zip(partners, on, strict=True) if held]
            if all(reasons):  # what it belongs to is on, and changes nothing itself
                return reasons[0]
        return ""

    def _told(self, conditions: list[str], partners: list[Path]) -> str:
        parts = []
        for condition, partner in zip(conditions, partners, strict=True):
            name, dotted = needed_names(condition)[0], ".".join(partner)
            parts.append(condition.replace(name, dotted, 1))
        here = {
            "there are none" if path[0] in self.facts else f"{'.'.join(path)} is {written(self._value(path))}": None
            for path in partners
        }
        return f"matters only with {' or '.join(parts)}, and {', '.join(here)}"

    def _path(self, name: str, holder: Path) -> Path:
        """Where the setting that a condition names is: in the section that holds the condition, a fact, or anywhere."""
        if name in self.facts:
            return (name,)
        own = (*holder, *name.split("."))
        return own if self._known(own) is not None else tuple(name.split("."))

    def _get(self, holder: Path, name: str) -> Any:
        return self._value(self._path(name, holder))

    def _value(self, path: Path) -> Any:
        found: Any = self.facts if path[0] in self.facts else self.values
        for part in path:
            found = found[part]
        return found

    def _known(self, path: Path) -> Key | Section | None:
        found: Key | Section | None = self.section
        for part in path:
            found = found.keys.get(part) if isinstance(found, Section) else None
        return found


def _leaves(tree: Mapping[str, Any], section: Section, path: Path = ()) -> Iterator[Path]:
    for name, value in tree.items():
        known = section.keys.get(name)
        if isinstance(known, Section):
            yield from _leaves(value or {}, known, (*path, name))
        else:
            yield (*path, name)
