"""After an optimizer step, every router is told what the step's micro-batches came to, in any model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import LayerStatistics
from s2moe.parallel.expert_parallel import all_reduce_sum


@torch.no_grad()
def update_routers(model: nn.Module, routing: Sequence[tuple[LayerStatistics, ...]]) -> None:
    """Give each router of ``model`` its feedback, summed over micro-batches and ranks.

    Args:
        routing: the ``routing`` of each micro-batch's output since the last step.
    """
    if not routing:
        return
    layers = {module.layer: module for module in model.modules() if isinstance(module, SMoELayer)}
    for per_microbatch in zip(*routing, strict=True):
        moe = layers[per_microbatch[0].layer]
        parts = [statistics.feedback for statistics in per_microbatch if statistics.feedback is not None]
        if parts and not moe.router.frozen:
            moe.router.after_step(all_reduce_sum(torch.stack(parts).sum(0), moe.parallel.data_group))
