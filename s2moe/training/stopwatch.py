"""Wall time of pieces of work that take turns, so that a machine's drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median, interquartile range and minimum of the repeats, milliseconds."""

    ms: float
    spread_ms: float
    fastest_ms: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        spread = 0.0
        if len(samples) > 1:
            low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
            spread = high - low
        return cls(statistics.median(samples), spread, min(samples), len(samples))


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs its argument and returns the milliseconds it took, on the GPU's clock if there is one."""

    def on_cpu(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    def on_gpu(work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return on_gpu if device.type == "cuda" else on_cpu


def take_turns(
    names: Sequence[str],
    measure: Callable[[str], float],
    repeats: int,
    slow: Collection[str] = (),
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Every name's measurements, one a round.

    Each round begins with another name, and goes through them forwards and backwards in turn, so that none always
    comes after the same other one. All work must have been done once before. The ``slow`` ones take part in the first
    round only.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        first = number % len(names)
        order = [*names[first:], *names[:first]]
        for name in order if number % 2 == 0 else [order[0], *reversed(order[1:])]:
            if number == 0 or name not in slow:
                samples[name].append(measure(name))
        after_round()
    return samples
