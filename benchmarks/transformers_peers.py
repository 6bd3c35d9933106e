"""Transformers' Mixtral block, with each of its implementations of the experts.

Legend: T tokens, D model, F hidden, E experts.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.implementation import Implementation, Unavailable, Weights
from benchmarks.shapes import Shape

PREFIX = "transformers_"


def names() -> list[str]:
    """One for every implementation this transformers release knows, kernels for GPUs included."""
    return [PREFIX + kind for kind in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys())]


def mixtral_block(shape: Shape, weights: Weights, kind: str, dtype: torch.dtype) -> nn.Module:
    """``MixtralSparseMoeBlock`` with these weights: softmax over all experts, top-k, renormalised."""
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_hidden,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        hidden_act="silu",
    )
    config._experts_implementation = kind
    with weights.router_ED.device:
        block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(torch.cat((weights.w1_EFD, weights.w3_EFD), dim=1))
        block.experts.down_proj.copy_(weights.w2_EDF)
    return block.to(dtype).train()


def build(name: str, shape: Shape, weights: Weights, dtype: torch.dtype) -> Implementation:
    """The block named ``transformers_<kind>``.

    Raises:
        Unavailable: for batched_mm where a copy of an expert for each assignment does not fit into memory.
    """
    kind = name.removeprefix(PREFIX)
    if kind == "batched_mm":
        _require_memory(shape, weights.router_ED.device, dtype)
    block = mixtral_block(shape, weights, kind, dtype)

    def forward(hidden_1TD: Tensor) -> tuple[Tensor, None]:
        return block(hidden_1TD), None

    return Implementation(name, block, forward, "renormalised")


def _require_memory(shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """batched_mm keeps a copy of the three matrices for each assignment, and makes their gradients too."""
    assignments = shape.tokens * shape.experts_per_token
    needed = 2 * assignments * 3 * shape.hidden_size * shape.expert_hidden * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > 0.7 * free:
        raise Unavailable(f"would take {needed / 2**30:.0f} GiB of the {free / 2**30:.0f} free")
