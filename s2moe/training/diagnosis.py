"""Where a non-finite loss comes from.

Called once, when a run is about to stop: the weights are still those that produced the loss, and
everything random is keyed, so the forward pass can be repeated with every module watched. All
processes take part, since the experts' exchange needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import gather, rank


@dataclass(frozen=True)
class Finding:
    """What one process saw: its non-finite losses by accumulation index, and the first bad parameter or module."""

    rank: int
    losses: tuple[int, ...]
    parameter: str | None
    module: str | None

    def text(self) -> str:
        """The finding as a clause; empty where nothing was wrong on this process."""
        if not (self.losses or self.parameter or self.module):
            return ""
        if self.parameter:
            return f"rank {self.rank}: the parameter {self.parameter} holds non-finite values"
        if self.module:
            return f"rank {self.rank}: the first non-finite values are in the output of {self.module}"
        return f"rank {self.rank}: every module's output is finite, so the loss itself overflows"


def find_cause(module: nn.Module, losses: list[Tensor], forward: Callable[[int], Any]) -> str:
    """Name rank, micro-batch and layer of a step's first non-finite loss. Collective.

    Args:
        losses: this process' loss of each micro-batch of the step.
        forward: repeats the forward pass of the micro-batch with this accumulation index.
    """
    bad = tuple(index for index, loss in enumerate(losses) if not torch.isfinite(loss))
    findings = gather(Finding(rank(), bad, _first_bad_parameter(module), None))
    first = min((index for finding in findings for index in finding.losses), default=0)
    with torch.no_grad():
        name = _first_bad_module(module, lambda: forward(first))
    findings = gather(Finding(rank(), bad, _first_bad_parameter(module), name))
    ranks = ", ".join(str(finding.rank) for finding in findings if first in finding.losses)
    clauses = "; ".join(filter(None, (finding.text() for finding in findings)))
    return f"loss not finite on rank {ranks or '?'}, micro-batch {first} of the step ({clauses})"


def _first_bad_parameter(module: nn.Module) -> str | None:
    for name, parameter in module.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 keeps this process' part there
        if not torch.isfinite(held.detach()).all():
            return name
    return None


def _first_bad_module(module: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first module to return something non-finite; inner modules return before the outer ones."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and any(not torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(name or "the model")) for name, m in module.named_modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
