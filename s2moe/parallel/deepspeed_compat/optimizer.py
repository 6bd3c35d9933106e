"""Groups of parameters as ZeRO wants them: experts apart, frozen ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from s2moe.parallel.deepspeed_compat.layer import EngineMoELayer, stacked_experts, tag_parameters
from s2moe.parallel.deepspeed_compat.release import deepspeed

if deepspeed is not None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

FROZEN = "frozen"  # key of the optimizer groups whose learning rate stays zero


def optimizer_groups(
    model: nn.Module,
    weight_decay: float,
    lr_factor: Callable[[str], float] | None = None,
    decay_all: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for a client optimizer: decayed and not, experts apart, as ZeRO needs them.

    Decayed are matrices, embeddings included. Biases, norms, vectors and temperatures are not; nor is the
    mlp form's expert bias [L, 1, F].

    Frozen experts have to stay in the optimizer: ZeRO 1 and 2 refuse a model with expert layers and no group of
    experts, and ZeRO 3 cannot save experts that need no gradient. They are told to need one, get none, as their
    layers detach them (moe/experts.py), and stand in a group FROZEN without learning rate and decay. The price is
    the memory of their optimizer state.

    Args:
        lr_factor: what a parameter's learning rate is to be multiplied with, by its name. Each factor has groups of
            its own, which hold it as ``lr_factor``, highest first.
        decay_all: decay every parameter.
    """
    tag_parameters(model)
    held = frozen_experts(model)
    held_ids = {id(parameter) for parameter in held}
    parts: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held_ids:
            is_bias = parameter.squeeze().dim() < 2 or (parameter.dim() == 3 and parameter.shape[1] == 1)
            factor = 1.0 if lr_factor is None else lr_factor(name)
            parts.setdefault(("plain" if is_bias and not decay_all else "decayed", -factor), []).append(parameter)
    for parameter in held:
        parameter.requires_grad_(True)
    parameter_groups: list[dict[str, Any]] = []
    for (kind, negative), parameters in sorted(parts.items(), key=lambda item: item[0]):
        group = {"params": parameters, "weight_decay": weight_decay if kind == "decayed" else 0.0, "name": kind}
        if lr_factor is not None:
            group |= {"name": f"{kind}, learning rate x {-negative:g}", "lr_factor": -negative}
        parameter_groups.append(group)
    if held:
        parameter_groups.append({"params": held, "weight_decay": 0.0, "lr": 0.0, FROZEN: True, "name": "frozen"})
    split = split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    return [group for group in split if group["params"]]


def need_no_gradient(model: nn.Module) -> None:
    """Undo what ``optimizer_groups`` tells frozen experts, where DeepSpeed does not train: DDP would wait for them."""
    for parameter in frozen_experts(model):
        parameter.requires_grad_(False)


def frozen_experts(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the experts that moe/freezing.py froze."""
    stacks = [stacked_experts(layer) for layer in model.modules() if isinstance(layer, EngineMoELayer)]
    return [parameter for experts in stacks if experts.frozen for parameter in experts.parameters()]
