"""TensorBoard: scalars, and for each SMoE layer the load of its experts as histogram and heat-map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .routing_totals import LayerTotals

CELL = 16  # pixels of one expert in the heat-map
_COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)


class TensorBoard:
    """Event files in `directory`; events of steps after `step` are hidden when a run is resumed."""

    def __init__(self, directory: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Every number of an event."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def loads(self, step: int, layers: Sequence[LayerTotals]) -> None:
        """Load histogram of each layer and one picture of all of them, layers downwards, experts across."""
        for layer in layers:
            self._writer.add_histogram(f"load/layer_{layer.layer}", np.array(layer.load_E), step)
        if layers:
            picture = heat_map([layer.load_E for layer in layers])
            self._writer.add_image("load/heat_map", picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def heat_map(loads: Sequence[Sequence[float]]) -> NDArray[np.uint8]:
    """RGB picture [layers * CELL, experts * CELL, 3]: dark is no load, green (the middle) the mean, yellow twice it."""
    position = np.clip(np.array(loads) / 2, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(position.astype(int), len(_COLOURS) - 2)
    part = (position - low)[..., None]
    colour = _COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part
    return colour.round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
