"""Our layers, and the dense MLP of equal active FLOPs.

Legend: T tokens, D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Weights
from benchmarks.shapes import Shape
from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import DenseMLP, build_layer
from s2moe.moe.routing import RoutingContext


def dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> Implementation:
    """A gated MLP with as many multiplications per token as k experts: hidden width k F."""
    width = shape.experts_per_token * shape.expert_hidden
    with device:
        mlp = DenseMLP(shape.hidden_size, width, "gated", "silu").to(dtype)
    return Implementation("dense", mlp, lambda hidden_1TD: (mlp(hidden_1TD), None))


def smoe(name: str, shape: Shape, weights: Weights, choices: int, dtype: torch.dtype) -> Implementation:
    """Linear top-k routing, dropless, balance loss on: ``choices`` experts for each token."""
    router = {"name": "topk", "renormalise": choices > 1}
    settings = {"method": "smoe", "experts_per_token": choices, "router": router}
    reference = "renormalised" if choices > 1 else "unnormalised"
    return _build(name, shape, weights, settings, dtype, reference)


def s2moe(name: str, shape: Shape, weights: Weights, dtype: torch.dtype) -> Implementation:
    """S2MoE, flop-matched to top-2: one expert for each token, one for its noisy copy; gate and InfoNCE."""
    return _build(name, shape, weights, {"method": "s2moe"}, dtype, None)


def _build(
    name: str,
    shape: Shape,
    weights: Weights,
    settings: dict[str, Any],
    dtype: torch.dtype,
    reference: str | None,
) -> Implementation:
    settings = {**settings, "num_experts": shape.num_experts, "expert_hidden": shape.expert_hidden}
    with weights.router_ED.device:
        layer = build_layer(resolve_moe(settings), shape.hidden_size, layer=0)
    _load(layer, weights)
    layer.to(dtype).train()

    def forward(hidden_1TD: Tensor) -> tuple[Tensor, Tensor]:
        out_1TD, statistics = layer(hidden_1TD, RoutingContext())
        return out_1TD, statistics.loss

    return Implementation(name, layer, forward, reference)


@torch.no_grad()
def _load(layer: Any, weights: Weights) -> None:
    layer.router.scores.weight.copy_(weights.router_ED)
    layer.experts.w1.copy_(weights.w1_EFD)
    layer.experts.w2.copy_(weights.w2_EDF)
    layer.experts.w3.copy_(weights.w3_EFD)
