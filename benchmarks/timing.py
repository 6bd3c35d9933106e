"""Wall time of forward and backward, implementations taking turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from benchmarks.implementation import Implementation
from s2moe.training import stopwatch as turns
from s2moe.training.stopwatch import Timing, stopwatch


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
    """Time every implementation once per round. All must have run before; the ``slow`` ones only have one turn."""
    clock = stopwatch(hidden_1TD.device)
    leaf = hidden_1TD.detach().clone().requires_grad_()

    def time_one(name: str) -> float:
        implementation = implementations[name]
        taken = clock(lambda: step(implementation, leaf, gradient_1TD))
        implementation.module.zero_grad(set_to_none=True)
        leaf.grad = None
        return taken

    samples = turns.take_turns(list(implementations), time_one, repeats, slow)
    return {name: Timing.of(taken) for name, taken in samples.items()}
