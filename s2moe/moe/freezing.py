"""Freezing routers and experts, for fine-tuning.

Chi et al. 2022 ("On the Representation Collapse of Sparse Mixture of Experts") fine-tune with routers and experts
fixed and the balance loss kept: routing then stays what pre-training made it, up to the hidden states that enter
it. Those still feel the balance loss, whose gradient passes through a frozen router's weights into them.

Frozen with a router is all that is its own: temperatures, and what it changes between steps, such as a selection
bias. Frozen with the experts are the shared ones. S2MoE's mixing gate is neither.
"""

from __future__ import annotations

from torch import nn

from s2moe.moe.layer import SMoELayer

PARTS = {  # routers, experts
    "none": (False, False),
    "routers": (True, False),
    "experts": (False, True),
    "routers_and_experts": (True, True),
}


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


def freeze_named(model: nn.Module, parts: str) -> None:
    """``freeze`` what one name of PARTS stands for."""
    routers, experts = PARTS[parts]
    if routers or experts:
        freeze(model, routers, experts)
