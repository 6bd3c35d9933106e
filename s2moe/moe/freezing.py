"""Freezing routers and experts, for fine-tuning.

Chi et al. 2022 ("On the Representation Collapse of Sparse Mixture of Experts") fine-tune with routers and experts
fixed and the balance loss kept: routing then stays what pre-training made it, up to the hidden states that enter
it. Those still feel the balance loss, whose gradient passes through a frozen router's weights into them.

Frozen with a router is all that is its own: temperatures, and what it changes between steps, such as a selection
bias. Frozen with the experts are the shared ones. S2MoE's mixing gate is neither.

A block of another architecture may have parts beside its SMoE layer (hub/block.py): Qwen2-MoE's shared expert, and an
output bias that all experts share, are frozen with the experts; the shared expert's gate, which weighs it by the
token, with the routers.
"""

from __future__ import annotations

from torch import nn

from s2moe.moe.layer import SMoELayer
from s2moe.moe.routers import Router
from s2moe.parallel.deepspeed_compat import stacked_experts

PARTS = {  # routers, experts
    "none": (False, False),
    "routers": (True, False),
    "experts": (False, True),
    "routers_and_experts": (True, True),
}
SHARED, SHARED_GATES = ("shared_expert", "bias"), ("shared_expert_gate",)  # what a block may have beside its SMoE layer


def freeze(model: nn.Module, routers: bool = True, experts: bool = True) -> None:
    """Fix the routers, the experts or both of every SMoE layer of ``model``. To be called before an optimizer is made.

    Raises:
        ValueError: if there is no SMoE layer.
    """
    layers = [module for module in model.modules() if isinstance(module, SMoELayer)]
    if not layers:
        raise ValueError("there is nothing to freeze: the model has no SMoE layer")
    for layer in layers:
        if routers:
            layer.router.requires_grad_(False)
            layer.router.frozen = True
        if experts:
            layer.experts.requires_grad_(False)
            layer.experts.frozen = True
            if layer.shared is not None:
                layer.shared.requires_grad_(False)
    beside = (SHARED_GATES if routers else ()) + (SHARED if experts else ())
    for module in model.modules():
        if isinstance(getattr(module, "moe", None), SMoELayer):
            for part in (getattr(module, name, None) for name in beside):
                if part is not None:
                    part.requires_grad_(False)


def freeze_named(model: nn.Module, parts: str) -> None:
    """``freeze`` what one name of PARTS stands for."""
    routers, experts = PARTS[parts]
    if routers or experts:
        freeze(model, routers, experts)


def freeze_as_adapted(model: nn.Module) -> None:
    """Freeze every router and all experts of which an adapter around ``model`` (PEFT's) saves nothing.

    Not their weights alone, which the adapter has fixed. What a router changes between steps, selection biases and
    thresholds, is saved with an adapter only where it saves a copy of the whole router (``modules_to_save``): any
    other router keeps what it has, an adapted matrix or none. Frozen experts are known as such to DeepSpeed's
    optimizer (parallel/deepspeed_compat).
    """
    for layer in model.modules():
        if isinstance(layer, SMoELayer):
            if isinstance(layer.router, Router):  # PEFT's copy of a whole one is none
                layer.router.frozen = True
            if not any(parameter.requires_grad for parameter in layer.experts.parameters()):
                stacked_experts(layer).frozen = True
