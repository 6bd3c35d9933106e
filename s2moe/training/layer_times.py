"""Time inside the SMoE layers, by part: dispatch, all-to-all, experts; forward, backward and recomputation together.

These parts are stretches of a forward pass, and their backward has no place in our code that a clock could be
put around. So they are only labelled (`record_function` in moe/dispatch.py and moe/experts.py), and on a sampled
step torch's profiler looks at one micro-batch. Autograd numbers the operations of a forward pass, and its
backward functions carry the number of theirs: through it a backward operation is charged to the label under
which its forward ran.

A label costs a few microseconds, a sample the profiler's own overhead on one micro-batch; every process samples
at the same steps, for they wait for one another anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from s2moe.parallel.regions import ALL_TO_ALL, DISPATCH, EXPERTS

from .profiler import make_profiler

PARTS = {DISPATCH: "dispatch", ALL_TO_ALL: "all_to_all", EXPERTS: "experts"}
BACKWARD = 1  # torch's RecordScope::BACKWARD_FUNCTION
FIRST_SAMPLE = 10  # a step early enough for short runs, and late enough for the caches to be warm


class LayerTimes:
    """Samples one micro-batch at step FIRST_SAMPLE and at every multiple of `every` (0: never)."""

    def __init__(self, every: int, device: torch.device, say: Callable[[str], None]) -> None:
        self._every, self._device, self._say = every, device, say
        self._sample: dict[str, float] = {}

    def is_due(self, step: int) -> bool:
        """Whether to look at step number `step` (from 1)."""
        return self._every > 0 and (step == FIRST_SAMPLE or step % self._every == 0)

    @contextmanager
    def sample(self) -> Iterator[None]:
        """Look at what runs within. A profiler that does not work is said once, and is no reason to stop."""
        profiler = make_profiler(self._device)
        try:
            profiler.start()
        except RuntimeError as error:
            self._give_up(error)
            yield
            return
        try:
            yield
        finally:
            try:
                profiler.stop()
                self._sample = part_seconds(profiler.events(), on_gpu=self._device.type == "cuda")
            except RuntimeError as error:
                self._give_up(error)

    def read(self) -> dict[str, float]:
        """Seconds of each part in the sample since the last call, empty without one."""
        sample, self._sample = self._sample, {}
        return sample

    def _give_up(self, error: RuntimeError) -> None:
        self._every = 0
        self._say(f"note: no times inside the layers, torch's profiler fails: {error}")


def part_seconds(events: Iterable[Any], on_gpu: bool = False) -> dict[str, float]:
    """Seconds of each part from a profiler's events, each operation's own time charged once.

    An operation belongs to the innermost label around it. A backward function belongs to the label of its
    forward operation; what activation checkpointing recomputes inside of it has labels of its own.
    """
    events = sorted((e for e in events if e.device_type == torch.autograd.DeviceType.CPU), key=_start)
    labels: dict[int, str | None] = {}  # by id of the event
    of_forward: dict[tuple[int, int], str | None] = {}  # by thread and number; later operations overwrite earlier ones
    seconds = dict.fromkeys(PARTS.values(), 0.0)
    for event in events:  # parents and forward operations come first
        parent = event.cpu_parent
        if event.name in PARTS:
            label: str | None = PARTS[event.name]
        elif event.scope == BACKWARD and event.sequence_nr >= 0:
            label = of_forward.get((event.fwd_thread, event.sequence_nr))
        elif parent is None or (parent.scope == BACKWARD and event.sequence_nr >= 0):
            label = None  # the latter: a forward operation within a backward function is recomputation
        else:
            label = labels.get(id(parent))
        labels[id(event)] = label
        if event.sequence_nr >= 0 and event.scope != BACKWARD and not event.name.startswith("autograd::engine"):
            of_forward[event.thread, event.sequence_nr] = label
        if label is not None:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[label] += own / 1e6
    return seconds


def _start(event: Any) -> tuple[float, float]:
    return event.time_range.start, -event.time_range.end
