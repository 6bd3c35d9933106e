"""Parameter groups for fine-tuning: experts and frozen weights as DeepSpeed needs them, learning rates by depth."""

from __future__ import annotations

from typing import Any

from torch import nn

from s2moe.config.learning_rates import LearningRates
from s2moe.parallel.deepspeed_compat import optimizer_groups

from .adapters import freeze_what_an_adapter_leaves


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, rates: LearningRates | None = None
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer, as DeepSpeed needs them with experts, each with its learning rate.

    To be called after ``moe.freezing.freeze`` and before DeepSpeed or accelerate prepares the model.
    """
    freeze_what_an_adapter_leaves(model)
    factor = (rates or LearningRates()).factors(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    groups = optimizer_groups(model, weight_decay, factor)
    return [{"lr": lr * group["lr_factor"], **group} if "lr_factor" in group else group for group in groups]
