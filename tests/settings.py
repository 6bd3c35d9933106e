"""Settings of a run for tests that share them: as in a file, what has no effect in one of the runs is no error."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from s2moe.config import load
from s2moe.config.plain_yaml import write_yaml
from s2moe.options import deep_merge

Config = TypeVar("Config")


def as_in_a_file(cls: type[Config], settings: Mapping[str, Any]) -> Config:
    """The configuration of dotted keys and their values."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        part: Any = value
        for name in reversed(key.split(".")):
            part = {name: part}
        tree = deep_merge(tree, part)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "settings.yaml"
        path.write_text(write_yaml(tree), encoding="utf-8")
        return load(cls, path)
