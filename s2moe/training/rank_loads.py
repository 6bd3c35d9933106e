"""How unevenly the experts' work falls on the ranks that share them: what the slowest of them costs.

Legend: M micro-batches, L SMoE layers, P ranks that share the experts, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from s2moe.moe.routing import LayerStatistics
from s2moe.parallel import ExpertParallel

KEPT = 64  # micro-batches before a log event that are looked at


class RankLoads:
    """Keeps what each micro-batch sent to each rank's experts; two small kernels a micro-batch, no wait."""

    def __init__(self, parallel: ExpertParallel) -> None:
        self._parallel = parallel
        self._kept: deque[Tensor] = deque(maxlen=KEPT)

    def add(self, routing: Sequence[LayerStatistics]) -> None:
        """The report of one micro-batch on this process."""
        if self._parallel.size > 1 and routing:
            counts_LE = torch.stack([layer.counts_E for layer in routing])
            self._kept.append(counts_LE.view(len(counts_LE), self._parallel.size, -1).sum(2))

    def read(self) -> tuple[float, float] | None:
        """Mean and largest ratio since the last call, None without expert parallelism. Collective in the group."""
        if not self._kept:
            return None
        rows_MLP = torch.stack(list(self._kept))
        self._kept.clear()
        dist.all_reduce(rows_MLP, group=self._parallel.group)
        return slowest_rank(rows_MLP)


def slowest_rank(rows_MLP: Tensor) -> tuple[float, float]:
    """Rows of the busiest rank over the mean, for each micro-batch and layer: their mean and maximum. 1 is even."""
    rows_MLP = rows_MLP.double()
    ratio_ML = rows_MLP.amax(2) / rows_MLP.mean(2).clamp(min=1e-9)
    mean, largest = torch.stack((ratio_ML.mean(), ratio_ML.max())).tolist()
    return mean, largest
