"""Wall time of forward and backward, implementations taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.implementation import Implementation


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


def step(implementation: Implementation, hidden_1TD: Tensor, gradient_1TD: Tensor) -> None:
    """Forward and backward, with gradients of input and parameters, the auxiliary loss included."""
    out_1TD, loss = implementation.forward(hidden_1TD)
    if loss is None:
        out_1TD.backward(gradient_1TD)
    else:
        torch.autograd.backward((out_1TD, loss), (gradient_1TD, torch.ones_like(loss)))


def take_turns(
    implementations: Mapping[str, Implementation],
    hidden_1TD: Tensor,
    gradient_1TD: Tensor,
    repeats: int,
    slow: Collection[str] = (),
) -> dict[str, Timing]:
    """Time every implementation once per round, so that the machine's drift hits all alike.

    Each of the ``repeats`` rounds starts with another implementation. All must have run before. The
    ``slow`` ones take part in the first round only.
    """
    clock = stopwatch(hidden_1TD.device)
    leaf = hidden_1TD.detach().clone().requires_grad_()

    def time_one(implementation: Implementation) -> float:
        taken = clock(lambda: step(implementation, leaf, gradient_1TD))
        implementation.module.zero_grad(set_to_none=True)
        leaf.grad = None
        return taken

    names = list(implementations)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            if round_number == 0 or name not in slow:
                samples[name].append(time_one(implementations[name]))
    return {name: Timing.of(taken) for name, taken in samples.items()}
