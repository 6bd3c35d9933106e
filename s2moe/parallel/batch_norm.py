"""Batch normalisation over the images of all ranks' micro-batches, on any backend.

Statistics of a rank's own images alone would make a model depend on how its batch is dealt out. torch's own
SyncBatchNorm needs GPUs; this one is two all-reduces, which gloo has as well: of the sums, and of the squares of what
is left, so that nothing is lost to cancellation. Gradients flow through both: the derivative of a sum over ranks is
the sum over ranks of what each has for it.

Legend: K channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from s2moe.precision import full_precision


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SynchronisedBatchNorm(_BatchNorm):
    """``nn.BatchNorm1d`` to ``3d`` whose training statistics are those of the whole group. Collective in training."""

    group: ProcessGroup

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        value, others = full_precision(input), [d for d in range(input.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(input.dim())]
        count = value.new_full((1,), input.numel() // input.shape[1])
        total_K1 = _AllReduceSum.apply(torch.cat((value.sum(others), count)), self.group)
        count, mean_K = total_K1[-1].detach(), total_K1[:-1] / total_K1[-1].detach()
        centred = value - mean_K.view(shape)
        var_K = _AllReduceSum.apply(centred.square().sum(others), self.group) / count
        self._track(mean_K.detach(), var_K.detach(), count)
        out = centred * torch.rsqrt(var_K + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean_K: Tensor, var_K: Tensor, count: Tensor) -> None:
        """Running statistics as torch keeps them: with the unbiased variance."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean_K.to(self.running_mean.dtype), rate)
        self.running_var.lerp_((var_K * count / (count - 1).clamp(min=1)).to(self.running_var.dtype), rate)


def synchronise_batch_norms(model: nn.Module, group: ProcessGroup | None) -> None:
    """Make every batch normalisation of ``model`` one over the ranks of ``group``, in place; None: there is one."""
    if group is None:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SynchronisedBatchNorm):
            module.__class__ = SynchronisedBatchNorm  # the same parameters, buffers and hooks
            module.group = group  # type: ignore[assignment]
