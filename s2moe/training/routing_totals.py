"""Sums of what the layers report, over the micro-batches and processes of a log interval.

Summed on the device in one tensor, so that a micro-batch costs two kernels and no wait for the
device; a log event costs one all-reduce and one copy.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from s2moe.moe.routing import LayerStatistics


@dataclass(frozen=True)
class LayerTotals:
    """One layer over a log interval: assignments per expert, and the mean of each reported figure."""

    layer: int
    counts_E: tuple[float, ...]
    means: dict[str, float]

    @property
    def load_E(self) -> list[float]:
        """Each expert's share of the assignments, times the number of experts: 1 everywhere is balance."""
        total = sum(self.counts_E) or 1.0
        return [count * len(self.counts_E) / total for count in self.counts_E]


class RoutingTotals:
    """Adds up micro-batches until `reduce` reads and clears the sums."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._layout: list[tuple[int, int, tuple[str, ...]]] = []
        self._microbatches = 0

    def add(self, routing: Sequence[LayerStatistics]) -> None:
        """Add the report of one micro-batch on this process."""
        if not routing:
            return
        self._layout = [(r.layer, r.counts_E.numel(), tuple(r.values)) for r in routing]
        pieces = [r.counts_E.double() for r in routing]
        figures = [value.double() for r in routing for value in r.values.values()]
        flat = torch.cat([*pieces, torch.stack(figures)] if figures else pieces)
        self._sum = flat if self._sum is None else self._sum.add_(flat)
        self._microbatches += 1

    def reduce(self) -> list[LayerTotals]:
        """Totals over all processes since the last call; empty for a model without SMoE layers. Collective."""
        if self._sum is None:
            return []
        total = torch.cat([self._sum, self._sum.new_full((1,), self._microbatches)])
        if dist.is_initialized():
            dist.all_reduce(total)
        numbers = total.tolist()
        microbatches = numbers.pop()
        self._sum, self._microbatches = None, 0
        counts = [[numbers.pop(0) for _ in range(experts)] for _, experts, _ in self._layout]
        return [
            LayerTotals(layer, tuple(count), {name: numbers.pop(0) / microbatches for name in names})
            for (layer, _, names), count in zip(self._layout, counts, strict=True)
        ]
