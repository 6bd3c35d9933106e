"""The precision in which routers and losses compute."""

import torch
from torch import Tensor


def full_precision(value: Tensor) -> Tensor:
    """float32, whatever the model's dtype; float64 stays, so that references can be exact."""
    return value if value.dtype == torch.float64 else value.float()
