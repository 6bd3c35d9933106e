"""What all language models with SMoE layers share, whether their blocks are this project's or another's.

Legend: B batch, S sequence, T = B S tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from s2moe.models.recomputation import WithoutReentrance
from s2moe.models.zero3 import without_zero3
from s2moe.moe.feedback import update_routers
from s2moe.moe.layer import expert_degree
from s2moe.moe.routing import LayerStatistics, RoutingContext


@dataclass
class S2MoEModelOutput(BaseModelOutputWithPast):
    """``routing``: what each SMoE layer reports, in order of layers."""

    routing: tuple[LayerStatistics, ...] | None = None


@dataclass
class S2MoECausalLMOutput(CausalLMOutputWithPast):
    """``loss`` = ``task_loss`` (mean cross-entropy, nats) + ``aux_loss`` (mean over SMoE layers)."""

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    routing: tuple[LayerStatistics, ...] | None = None


class RoutedModel(WithoutReentrance):
    """Put before a ``PreTrainedModel`` with SMoE layers."""

    _forwards = 0  # training passes so far, which key the noise where no context does

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. Under ZeRO 3 too every process reads the whole model; the engine cuts it up later.

        transformers would have DeepSpeed cut up every weight as it is made, and fill it from rank 0.
        """
        with without_zero3():
            return super().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        with without_zero3():
            return super()._from_config(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """transformers' own.

        Raises:
            ValueError: the experts are dealt to several processes, and no ``state_dict`` has them all.
        """
        if len(args) < 2 and kwargs.get("state_dict") is None:
            degree = expert_degree(self)
            if degree > 1:
                raise ValueError(
                    f"this process has 1/{degree} of the experts, and would save those alone: use "
                    "s2moe.finetuning.loading.save_pretrained(model, directory), which gathers them, on all processes"
                )
        super().save_pretrained(save_directory, *args, **kwargs)

    def update_routers(self, routing: list[tuple[LayerStatistics, ...]]) -> None:
        """``s2moe.moe.feedback.update_routers`` of this model."""
        update_routers(self, routing)

    def _context(
        self,
        context: RoutingContext | None,
        experts_per_token: int | None,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        target_BS: Tensor | None,
    ) -> RoutingContext:
        """What the layers are told of this forward pass: the caller's context, completed."""
        if context is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            context = RoutingContext(seed=torch.initial_seed(), step=self._forwards, microbatch=rank)
            self._forwards += self.training
        embedded = input_ids if inputs_embeds is None else inputs_embeds
        assert embedded is not None
        if isinstance(attention_mask, dict):  # by kind of layer, as `generate` makes them for a static cache
            attention_mask = attention_mask.get("full_attention")
        # A mask of another shape covers cached positions too, or is already a matrix: no padding to leave out.
        if attention_mask is not None and attention_mask.shape == embedded.shape[:2]:
            context = replace(context, mask_T=attention_mask.reshape(-1).bool())
        if experts_per_token is not None:
            context = replace(context, experts_per_token=experts_per_token)
        return replace(
            context,
            layers=self.config.num_hidden_layers,
            token_T=None if input_ids is None else input_ids.reshape(-1),
            target_T=None if target_BS is None else target_BS.reshape(-1),
            attention_mask=attention_mask,
        )


def aligned_targets(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """What is to be predicted at each position [B, S], -100 for nothing; None without labels."""
    if shift_labels is None and labels is not None:
        return F.pad(labels[:, 1:], (0, 1), value=-100)
    return shift_labels


def mean_loss(routing: tuple[LayerStatistics, ...], device: torch.device) -> Tensor | None:
    """The mean of the SMoE layers' auxiliary losses, on ``device`` (layers may be on several); None without layers."""
    return torch.stack([layer.loss.to(device) for layer in routing]).mean() if routing else None


def batch_share(target_BS: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This batch's share of the labels over which a trainer sums losses; 1 where it takes means.

    So the auxiliary loss weighs the same however many batches a step accumulates.
    """
    if num_items_in_batch is None:
        return 1.0
    return target_BS.ne(-100).sum() / at_least_one(num_items_in_batch)


def label_count(target_BS: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | int:
    """What the summed cross-entropy is divided by: a trainer's count, or this batch's; 1 where there is no label.

    The loss of a batch without labels is then 0, not 0 / 0.
    """
    count = target_BS.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return at_least_one(count)


def at_least_one(count: Tensor | int) -> Tensor | int:
    """The count, without a wait for its device, or 1."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
