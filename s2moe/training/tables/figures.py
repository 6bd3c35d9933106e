"""Pictures of a table: figures over seeds as boxes, which expert serves which class, how alike experts are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s2moe import drawing
from s2moe.training.heat_map import MOST_CLASSES

from .results import Run
from .spec import Table

BOXES, SELECTION, SIMILARITY = "boxes.png", "selection.png", "similarity.png"


def draw(table: Table, runs: Sequence[Run], directory: Path) -> list[Path]:
    """Write the pictures that the runs have the data for, and return their paths."""
    by_row = {row.name: [run for run in runs if run.row == row.name] for row in table.rows}
    labels = {row.name: row.label for row in table.rows}
    drawn = [_boxes(table, by_row, labels, directory / BOXES)]
    for key, file in (("selection", SELECTION), ("similarity", SIMILARITY)):
        shown = {name: found[0] for name, found in by_row.items() if found and len(found[0].evaluation[key]) > 1}
        drawn.append(_matrices(shown, labels, key, directory / file))
    return [path for path in drawn if path is not None]


def _boxes(table: Table, by_row: dict[str, list[Run]], labels: dict[str, str], path: Path) -> Path | None:
    panels = []
    for figure in table.boxes:
        values = {name: [r.figures[figure] for r in found if figure in r.figures] for name, found in by_row.items()}
        if any(values.values()):
            panels.append((figure, {name: value for name, value in values.items() if value}))
    if not panels:
        return None
    rows = max(len(values) for _, values in panels)
    canvas, axes = drawing.subplots(1, len(panels), figsize=(4.4 * len(panels), 1.2 + 0.34 * rows), squeeze=False)
    for axis, (figure, values) in zip(axes[0], panels, strict=True):
        places = range(len(values), 0, -1)
        axis.boxplot(list(values.values()), positions=list(places), orientation="horizontal", widths=0.6)
        for place, found in zip(places, values.values(), strict=True):
            axis.plot(found, [place] * len(found), "o", ms=3, alpha=0.5)
        axis.set_yticks(list(places), [labels[name] for name in values])
        axis.set(title=table.figures.get(figure, figure))
    drawing.save(canvas, path)
    return path


def _matrices(shown: dict[str, Run], labels: dict[str, str], key: str, path: Path) -> Path | None:
    """Matrices of one run of each row: shares of a class for `selection`, cosines for `similarity`."""
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    canvas, axes = drawing.subplots(lines, columns, figsize=(3.6 * columns, 2.9 * lines), squeeze=False)
    image: Any = None
    for axis, (name, run) in zip(axes.flat, shown.items(), strict=False):
        matrix = np.array(run.evaluation[key], dtype=float)
        if key == "selection":
            matrix = matrix / np.maximum(matrix.sum(0, keepdims=True), 1)
            image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            names = run.evaluation["classes"]
            if len(names) <= MOST_CLASSES:
                axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        else:
            image = axis.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(f"{labels[name]}, seed {run.seed}", fontsize=9)
        axis.set_ylabel("expert")
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_axis_off()
    what = "share of a class' images that select the expert" if key == "selection" else "cosine of experts' weights"
    canvas.colorbar(image, ax=axes, shrink=0.6, label=what)
    drawing.save(canvas, path)
    return path
