"""What every implementation of a shape is given: the same weights, tokens and output gradient.

Legend: T tokens, D model, F hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.implementation import Weights
from benchmarks.shapes import Shape

INITIALIZER_RANGE = 0.02


def draw_weights(shape: Shape, device: torch.device) -> Weights:
    """Normal weights, float32. On random tokens they load the experts nearly evenly."""
    width, hidden, experts = shape.hidden_size, shape.expert_hidden, shape.num_experts
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * INITIALIZER_RANGE).to(device)

    return Weights(
        router_ED=draw(experts, width),
        w1_EFD=draw(experts, hidden, width),
        w2_EDF=draw(experts, width, hidden),
        w3_EFD=draw(experts, hidden, width),
    )


def draw_tokens(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradient of the output, standard normal, [1, T, D] each."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn((2, 1, shape.tokens, shape.hidden_size), generator=generator).to(device, dtype)
    return drawn[0], drawn[1]
