"""Pictures as files. They know no window and no notebook: pyplot and its backend stay as the user has them."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Literal

DOTS_PER_INCH = 110


def subplots(
    rows: int = 1,
    columns: int = 1,
    *,
    figsize: tuple[float, float],
    layout: Literal["constrained"] | None = "constrained",
    squeeze: bool = True,
    **shared: Any,
) -> tuple[Any, Any]:
    """A figure and its axes, as ``pyplot.subplots`` has them. ``figsize`` in inches."""
    _import_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=squeeze, **shared)


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_figure(path, dpi=DOTS_PER_INCH, format="png")
    return path


def colour_map(name: str) -> Any:
    """matplotlib's colour map of this name: numbers in [0, 1] to colours."""
    _import_matplotlib()
    from matplotlib import colormaps

    return colormaps[name]


def _import_matplotlib() -> None:
    """Also where MPLBACKEND names a backend that is not installed, as it does in programs that a notebook starts.

    matplotlib itself then fails at being imported, whether or not that backend is used.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
