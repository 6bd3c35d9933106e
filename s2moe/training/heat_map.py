"""Which expert serves which class, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2moe import drawing

MOST_CLASSES = 20  # whose names fit below a picture


def selection(counts_MC: Any, experts: Sequence[int], classes: tuple[str, ...], title: str) -> Any:
    """The share of each class that selects an expert, as a figure.

    Args:
        counts_MC: how many images of each class select an expert.
        experts: the numbers of the experts whose rows these are.
    """
    share = counts_MC / counts_MC.sum(0).clip(min=1)
    named = len(classes) <= MOST_CLASSES
    size = (2 + 0.6 * min(len(classes), MOST_CLASSES), 1.5 + 0.35 * len(share))
    canvas, axis = drawing.subplots(figsize=size)
    image = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    if named:
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(share)), [str(i) for i in experts])
    axis.set(ylabel="expert", title=title)
    axis.title.set_fontsize(9)
    canvas.colorbar(image, ax=axis, label="share of the class")
    return canvas
