"""`profile.steps`: a trace of a few steps by torch's profiler, to look at in a browser (ui.perfetto.dev)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import profile

from .profiler import make_profiler

DIRECTORY = "profile"
TRACED_RANKS = 8  # one machine's; a file from each of thousands would help nobody


class Trace:
    """Records from the beginning of step `first` to the end of step `last` and writes one file a process."""

    def __init__(
        self,
        steps: tuple[int, int] | None,
        directory: Path,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._steps = steps if rank < TRACED_RANKS else None
        self._directory, self._rank, self._device, self._say = directory / DIRECTORY, rank, device, say
        self._profiler: profile | None = None

    @property
    def is_recording(self) -> bool:
        return self._profiler is not None

    def before(self, step: int) -> None:
        """Step number `step` begins. A run that is resumed within the range records the rest."""
        if self._steps is None or self._profiler is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        self._first = step
        profiler = make_profiler(self._device)
        try:
            profiler.start()
        except RuntimeError as error:
            self._steps = None
            self._say(f"note: no trace, torch's profiler fails: {error}")
            return
        self._profiler = profiler

    def after(self, step: int) -> None:
        """Step number `step` is done."""
        self._last = step
        if self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded. A trace is not worth the run: what goes wrong is said, not raised."""
        profiler, self._profiler, self._steps = self._profiler, None, None
        if profiler is None:
            return
        path = self._directory / f"steps-{self._first}-{self._last}.rank{self._rank}.pt.trace.json.gz"
        try:
            profiler.stop()
            self._directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            self._say(f"wrote {path}: open it in ui.perfetto.dev")
        except (OSError, RuntimeError) as error:
            self._say(f"note: the trace {path} could not be written: {error}")
