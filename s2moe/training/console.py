"""What a person sees of a running job: a progress bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from s2moe.data.units import UNKNOWN_SYMBOL


class Console:
    """Progress of the steps `step` to `steps`, written to `stream` (standard error). Bits are per `symbol`."""

    def __init__(self, steps: int, step: int = 0, stream: TextIO | None = None, symbol: str = "") -> None:
        self._stream = stream or sys.stderr
        self._steps, self._symbol = steps, symbol
        self._shown, self._shown_at = step, time.monotonic()
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", file=self._stream, dynamic_ncols=True)

    def step(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update()

    def event(self, step: int, values: dict[str, Any]) -> None:
        """Show the figures of a log event."""
        figures = format_figures(values, self._symbol)
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        else:
            now = time.monotonic()
            per_step = (now - self._shown_at) / max(1, step - self._shown)
            self._shown, self._shown_at = step, now
            left = format_seconds(per_step * (self._steps - step))
            print(f"step {step}/{self._steps}  {figures}  {left} left", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def format_figures(values: dict[str, Any], symbol: str = "") -> str:
    """The figures a person watches, those that an event has: loss, bits or error, speed, MFU, learning rate, norm."""
    bits = f"bits/{symbol or UNKNOWN_SYMBOL}"
    shown = [
        ("epoch", "epoch {:.1f}"),
        ("train/loss", "loss {:.4f}"),
        ("train/bpc", f"{bits} {{:.4f}}"),
        ("val/bpc", f"val {bits} {{:.4f}}"),
        ("train/error", "error {:.2%}"),
        ("val/error", "test error {:.2%}"),
        ("val/h_s", "H_s {:.3f}"),
        ("val/h_u", "H_u {:.3f}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("images_per_second", "{:,.0f} images/s"),
        ("mfu", "MFU {:.1%}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad norm {:.3g}"),
    ]
    return "  ".join(text.format(values[key]) for key, text in shown if values.get(key) is not None)


def format_seconds(seconds: float) -> str:
    """2:05 or 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
