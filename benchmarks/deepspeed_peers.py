"""DeepSpeed's two mixture-of-experts layers, each in one process with all experts.

Legend: T tokens, D model, F hidden, E experts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.implementation import Implementation, Unavailable, Weights
from benchmarks.shapes import Shape
from benchmarks.transformers_peers import mixtral_block
from s2moe.moe.layer import DenseMLP

AUXILIARY_COEFFICIENT = 0.01


def build(name: str, shape: Shape, weights: Weights, dtype: torch.dtype) -> Implementation:
    """``deepspeed_moe`` or ``deepspeed_autoep``.

    Raises:
        Unavailable: if deepspeed is not installed.
    """
    _initialise_deepspeed()
    builders: dict[str, Any] = {"deepspeed_moe": _native, "deepspeed_autoep": _autoep}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints about its groups
        layer = builders[name](shape, weights)
        layer.set_deepspeed_parallelism()
    layer.to(dtype).train()

    def forward(hidden_1TD: Tensor) -> tuple[Tensor, Tensor | None]:
        if name == "deepspeed_autoep":
            return layer(hidden_1TD), None
        out_1TD, balance_loss, _ = layer(hidden_1TD)
        return out_1TD, AUXILIARY_COEFFICIENT * balance_loss

    # Natively k = 1 is Switch's gate; AutoEP is told to do the same.
    return Implementation(name, layer, forward, "renormalised" if shape.experts_per_token > 1 else "unnormalised")


def _initialise_deepspeed() -> None:
    """A process group of this process alone, which both layers want."""
    try:
        import deepspeed
    except ImportError:
        raise Unavailable("deepspeed is not installed") from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # Else it compiles, for a minute, a collective that one process has no use for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def _native(shape: Shape, weights: Weights) -> Any:
    """``deepspeed.moe.layer.MoE``, dropless, without noise and random selection."""
    from deepspeed.moe.layer import MoE

    with weights.router_ED.device:
        layer = MoE(
            shape.hidden_size,
            DenseMLP(shape.hidden_size, shape.expert_hidden, "gated", "silu"),
            num_experts=shape.num_experts,
            k=shape.experts_per_token,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
    inner = layer.deepspeed_moe
    with torch.no_grad():
        inner.gate.wg.weight.copy_(weights.router_ED)
        for expert, mlp in enumerate(inner.experts.deepspeed_experts):
            mlp.gate.weight.copy_(weights.w1_EFD[expert])
            mlp.down.weight.copy_(weights.w2_EDF[expert])
            mlp.up.weight.copy_(weights.w3_EFD[expert])
    return layer


def _autoep(shape: Shape, weights: Weights) -> Any:
    """``AutoEPMoELayer`` in place of a Mixtral block, as AutoEP's Mixtral preset describes it.

    Its own detection of that block is broken with current transformers, so the description is written out.
    """
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.num_experts,
        top_k=shape.experts_per_token,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.expert_hidden,
        score_func="softmax",
        score_apply="post",
        route_norm=shape.experts_per_token > 1,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    device = weights.router_ED.device
    # Its grouped path needs Triton's activation, hence a GPU.
    config = AutoEPConfig(enabled=True, use_grouped_mm=device.type == "cuda")
    block = mixtral_block(shape, weights, "eager", weights.router_ED.dtype)
    with device:
        return AutoEPMoELayer(spec, block, ep_size=1, ep_rank=0, config=config)
