"""How long each phase of a step takes, without waiting for the device.

On the CPU a phase is a stretch of wall time. On a GPU the host only queues work, so a phase is the time
between two CUDA events in the stream; they are read at log events, when the device was waited for anyway.
So a phase there includes what the device waits for: data that is not ready, and in collectives other ranks.

Every phase is a label in a profiler's trace too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

# Of every step, in order. wait: for the slowest process, at the one collective before the optimizer.
STEP_PHASES = ("data", "forward", "backward", "wait", "step")
MOST_PENDING = 4096  # phases whose events are kept before the finished ones are read


class PhaseClock:
    """`with clock("forward"): ...` adds up seconds by name until `read`. Phases do not nest."""

    def __init__(self, device: torch.device, make_event: Callable[[], Any] | None = None) -> None:
        self._on_gpu = device.type == "cuda" or make_event is not None
        self._make_event = make_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []  # in the order of the stream
        self._free: list[Any] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with record_function(f"s2moe::{name}"):
            if self._on_gpu:
                start, end = self._event(), self._event()
                start.record()
                yield
                end.record()
                self._pending.append((name, start, end))
                if len(self._pending) > MOST_PENDING:
                    self._collect()
            else:
                begin = time.perf_counter()
                yield
                self._add(name, time.perf_counter() - begin)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call. Waits for the device."""
        if self._pending:
            self._pending[-1][2].synchronize()
            self._collect()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _event(self) -> Any:
        return self._free.pop() if self._free else self._make_event()

    def _collect(self) -> None:
        """Read the events that the device has passed."""
        done = 0
        for name, start, end in self._pending:
            if not end.query():
                break
            self._add(name, start.elapsed_time(end) / 1e3)
            self._free += (start, end)
            done += 1
        del self._pending[:done]

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
