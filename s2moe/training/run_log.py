"""Where the figures of a run go: metrics.jsonl, TensorBoard and the console. Only process 0 writes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2moe.config.run import Run
from s2moe.metrics.load import load_figures

from .console import Console, format_figures
from .metrics_log import MetricsLog
from .routing_totals import LayerTotals
from .tensorboard import TensorBoard


class RunLog:
    """The log of a run that continues from `step`. On processes other than 0 every method does nothing.

    Args:
        symbol: what figures per symbol are divided by; empty where there are none.
    """

    def __init__(self, config: Run, directory: Path, step: int, is_main: bool, symbol: str = "") -> None:
        evaluation: Any = getattr(config, "evaluation", None)
        self._symbol, self._part = symbol, getattr(evaluation, "max_symbols", None)
        self._images_every = config.logging.images_every
        self._images_at = step
        self._metrics = MetricsLog(directory / "metrics.jsonl", step) if is_main else None
        self._console = Console(config.training.steps, step, symbol=symbol) if is_main else None
        self._tensorboard = None
        if is_main and config.logging.tensorboard:
            self._tensorboard = TensorBoard(directory / "tensorboard", step)

    def step(self) -> None:
        """One optimizer step is done."""
        if self._console is not None:
            self._console.step()

    def training(self, step: int, values: dict[str, Any], layers: Sequence[LayerTotals]) -> None:
        """A log event of training: its figures, and what every SMoE layer did."""
        values = values | layer_figures(layers)
        self._write(step, values)
        if self._console is not None:
            self._console.event(step, values)
        if self._tensorboard is not None and self._images_due(step):
            self._tensorboard.loads(step, layers)

    def validation(self, step: int, values: dict[str, Any]) -> None:
        """A log event of a validation; written once, also where a start repeats the last one of an earlier start.

        The closing one, of the whole split, has tags of its own in TensorBoard, where the curve of those of a part of
        the split would jump.
        """
        is_closing = self._part is not None and values.get("val/symbols", 0) > self._part
        if self._metrics is not None and not self._metrics.has(step, values):
            self._write(step, values, rename=(("val/", "val_whole/") if is_closing else ("", "")))
        self.say(f"step {step}: {format_figures(values, self._symbol)}{', of the whole split' if is_closing else ''}")

    def probe(self, step: int, values: dict[str, Any], matrices: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """A log event of a probe: its figures, and matrices as pictures for TensorBoard alone."""
        self._write(step, values)
        if self._tensorboard is not None:
            self._tensorboard.matrices(step, matrices)

    def say(self, text: str) -> None:
        """Tell the person at the console something."""
        if self._console is not None:
            self._console.say(text)

    def close(self) -> None:
        """Flush and close everything; where one cannot be, the others all the same."""
        with contextlib.ExitStack() as stack:
            for sink in (self._metrics, self._tensorboard, self._console):
                if sink is not None:
                    stack.callback(sink.close)

    def _images_due(self, step: int) -> bool:
        """Whether a multiple of `images_every` was passed since the last pictures."""
        due = bool(self._images_every) and step // self._images_every > self._images_at // self._images_every
        if due:
            self._images_at = step
        return due

    def _write(self, step: int, values: dict[str, Any], rename: tuple[str, str] = ("", "")) -> None:
        """To both files; TensorBoard's tags may begin otherwise."""
        if self._metrics is not None:
            self._metrics.write(step, values)
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, {key.replace(*rename, 1): value for key, value in values.items()})


def layer_figures(layers: Sequence[LayerTotals]) -> dict[str, Any]:
    """Every layer's load figures and reported means, as `layer_3/load_entropy`, and its load as a list."""
    return {
        f"layer_{layer.layer}/{name}": value
        for layer in layers
        for name, value in (
            {"load": [round(load, 4) for load in layer.load_E]} | load_figures(layer.counts_E) | layer.means
        ).items()
    }
