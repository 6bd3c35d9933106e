"""An SMoE layer inside a Transformer block of another architecture.

Such a block calls ``mlp(hidden)`` and expects hidden states: no context goes in, no statistics come out. So the
block's class is extended: it takes ``routing_context`` beside its other arguments and holds it on its MLP for the
duration of its own forward. There are no globals; activation recomputation, which calls the block's forward again
with the same arguments, routes as the first pass did.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from s2moe.moe.config import MoEConfig
from s2moe.moe.layer import build_layer
from s2moe.moe.routing import LayerStatistics, RoutingContext
from s2moe.parallel import ExpertParallel


class SparseMLP(nn.Module):
    """Stands where a block of another architecture has its MLP: [B, S, D] to [B, S, D].

    Args:
        parallel: where the experts live; None for a single process.
        bias: the dense MLP's output bias, which all experts share.
        dropout: of the MLP's output.
        shared_expert, shared_expert_gate: of Qwen2-MoE, kept as they are: σ(gate) times that MLP is added.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_size: int,
        layer: int,
        parallel: ExpertParallel | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        shared_expert: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.moe = build_layer(config, hidden_size, layer, parallel)
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.dropout = nn.Dropout(dropout)
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate
        self.context: RoutingContext | None = None  # set by the block for the duration of its forward
        self.statistics: LayerStatistics | None = None  # of the last forward, until the model takes it

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        out_BSD, self.statistics = self.moe(hidden_BSD, self.context)
        if self.bias is not None:
            out_BSD = out_BSD + self.bias
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out_BSD = out_BSD + torch.sigmoid(self.shared_expert_gate(hidden_BSD)) * self.shared_expert(hidden_BSD)
        return self.dropout(out_BSD)


class _TakesContext:
    """What is put before a block's own class."""

    mlp: nn.Module

    def forward(self, *args: Any, routing_context: RoutingContext | None = None, **kwargs: Any) -> Any:
        if not isinstance(self.mlp, SparseMLP):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        self.mlp.context = routing_context
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.mlp.context = None

    def __reduce__(self) -> tuple[Any, ...]:
        theirs = type(self).__mro__[2]  # pickle finds classes by their names, and ours has theirs
        return _new_block, (theirs,), self.__dict__


@cache
def context_block(block: type[nn.Module]) -> type[nn.Module]:
    """The block's class, extended by the argument ``routing_context``. It is called as the block is."""
    return type(block.__name__, (_TakesContext, block), {"__module__": block.__module__, "__doc__": block.__doc__})


def _new_block(block: Any) -> nn.Module:
    extended = context_block(block)
    return extended.__new__(extended)


def sparse_blocks(model: nn.Module) -> list[SparseMLP]:
    """The SMoE layers that stand in a model of another architecture, in order."""
    return [module for module in model.modules() if isinstance(module, SparseMLP)]
