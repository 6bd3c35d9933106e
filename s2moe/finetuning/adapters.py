"""PEFT's adapters around models with experts."""

from __future__ import annotations

from torch import nn
from transformers.utils import is_peft_available

from s2moe.moe.freezing import freeze_as_adapted
from s2moe.moe.layer import SMoELayer
from s2moe.parallel.deepspeed_compat import stacked_experts


def is_adapter(model: nn.Module) -> bool:
    """Whether it is a PEFT model, which saves its adapter alone."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def freeze_what_an_adapter_leaves(model: nn.Module) -> None:
    """``moe.freezing.freeze_as_adapted`` of a PEFT model, before an optimizer is made; nothing of any other model."""
    if is_adapter(model):
        freeze_as_adapted(model)


def adapted_expert(model: nn.Module) -> str:
    """The first weight of an expert that is trained, by its name; empty where there is none."""
    experts = [stacked_experts(layer) for layer in model.modules() if isinstance(layer, SMoELayer)]
    # Frozen ones are told to need a gradient, and get none (optimizer_groups in parallel/deepspeed_compat).
    frozen = {id(weight) for stack in experts if stack.frozen for weight in stack.parameters(recurse=False)}
    trained = (name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in frozen)
    return next((name for name in trained if ".experts." in name), "")
