"""Where the experts of a layer live, and the sums over ranks that routing needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ExpertParallel:
    """Experts are dealt to ``size`` ranks in consecutive blocks; this process is number ``rank`` of them.

    ``group`` connects those ranks (None for one), ``data_group`` all ranks whose micro-batches make
    up the global batch (None for a single process).
    """

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts this rank holds. Raises ValueError where ``size`` does not divide."""
        if num_experts % self.size:
            raise ValueError(
                f"{num_experts} experts cannot be dealt to {self.size} expert-parallel ranks: "
                f"choose an expert-parallel degree that divides {num_experts}"
            )
        count = num_experts // self.size
        return range(self.rank * count, (self.rank + 1) * count)


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of ``tensor`` over ``group``; the tensor itself where there is no group. No gradient flows."""
    if group is None:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total
