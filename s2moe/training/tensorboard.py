"""TensorBoard: scalars, and for each SMoE layer the load of its experts as histogram and heat-map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2moe.disk import naming

from .routing_totals import LayerTotals

CELL = 16  # pixels of one expert in the heat-map
_COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)


class TensorBoard:
    """Event files in `directory`; events of steps after `step` are hidden when a run is resumed."""

    def __init__(self, directory: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Every number of an event."""
        with naming(self._directory):
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def loads(self, step: int, layers: Sequence[LayerTotals]) -> None:
        """Load histogram of each layer and one picture of all of them, layers downwards, experts across."""
        with naming(self._directory):
            for layer in layers:
                self._writer.add_histogram(f"load/layer_{layer.layer}", np.array(layer.load_E), step)
            if layers:
                picture = heat_map([layer.load_E for layer in layers])
                self._writer.add_image("load/heat_map", picture, step, dataformats="HWC")

    def matrices(self, step: int, matrices: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """A picture of each matrix by its name: cosines from -1 to 1, all others from 0 to 1."""
        with naming(self._directory):
            for name, matrix in matrices.items():
                picture = heat_map(matrix, -1.0 if name.endswith("cosine") else 0.0, 1.0)
                self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        with naming(self._directory):
            self._writer.close()


def heat_map(values: Sequence[Sequence[float]], low_end: float = 0.0, high_end: float = 2.0) -> NDArray[np.uint8]:
    """RGB picture [rows * CELL, columns * CELL, 3], from dark (``low_end``, or not a number) to yellow (``high_end``).

    Of loads, layers downwards: dark is no load, green (the middle) the mean, yellow twice it.
    """
    part_of_range = (np.nan_to_num(np.array(values), nan=low_end) - low_end) / (high_end - low_end)
    position = np.clip(part_of_range, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(position.astype(int), len(_COLOURS) - 2)
    part = (position - low)[..., None]
    colour = _COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part
    return colour.round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
