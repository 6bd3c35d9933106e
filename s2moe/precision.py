"""Full precision inside a model of lower precision: routers, losses, positions and balancing state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(value: Tensor) -> Tensor:
    """float32, whatever the model's dtype; float64 stays, so that references can be exact."""
    return value if value.dtype == torch.float64 else value.float()


def linear(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """value · weightᵀ + bias in full precision, under autocast too."""
    with torch.autocast(value.device.type, enabled=False):
        full_bias = None if bias is None else full_precision(bias)
        return F.linear(full_precision(value), full_precision(weight), full_bias)


class FullPrecisionLinear(nn.Linear):
    """A linear layer that computes in full precision. To be called, not read: an adapter may stand around it."""

    def forward(self, value: Tensor) -> Tensor:
        return linear(value, self.weight, self.bias)


class KeepsBuffers(nn.Module):
    """A module whose own buffers stay float32 when ``.bfloat16()`` or ``.half()`` converts the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                self._buffers[name] = old.to(buffer.device, torch.float32)
        return self
