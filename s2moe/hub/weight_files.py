"""The safetensors files of a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from s2moe.hub.reading import unreadable

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


class WeightFiles:
    """The tensors of a Hugging Face directory by name, read when and as far as they are needed.

    Attributes:
        shapes: of each tensor, by name.

    Raises:
        ConfigError: a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        index, names = directory / INDEX_FILE, {WEIGHTS_FILE}
        try:
            if index.is_file():
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            self._files = [safe_open(directory / name, framework="pt") for name in sorted(names)]
            self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (not a dict)
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise unreadable(directory, error) from error

    def read(self, name: str, row: int | None = None) -> Tensor:
        """The tensor, or one entry of its first dimension."""
        return self.rows(name) if row is None else self.rows(name, range(row, row + 1))[0]

    def rows(self, name: str, rows: range | None = None) -> Tensor:
        """The tensor, or these entries of its first dimension."""
        part = self._file_of[name].get_slice(name)
        return part[:] if rows is None else part[rows.start : rows.stop]
