"""The causal model with a classifier on the last real token's hidden state, for fine-tuning.

Its input stays the bytes, characters or subwords of pre-training, so the embeddings transfer.

Legend: B batch, S sequence, D model, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from s2moe.models.configuration import S2MoEConfig
from s2moe.models.modeling import S2MoEModel, S2MoEPreTrainedModel
from s2moe.models.routed import batch_share, mean_loss
from s2moe.moe.routing import LayerStatistics, RoutingContext
from s2moe.parallel import ExpertParallel

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as _Base
else:
    _Base = object  # what the mixin is put before


@dataclass
class S2MoESequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """``loss`` = ``task_loss`` (mean over texts) + ``aux_loss`` (mean over SMoE layers).

    Without labels, in evaluation, there are logits alone: neither ``aux_loss`` nor ``routing``.
    """

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    routing: tuple[LayerStatistics, ...] | None = None


class LastTokenClassifier(_Base):
    """The forward of a model with a ``base_model`` and a linear ``score`` of ``config.num_labels`` classes."""

    score: nn.Linear
    learned_positions = False  # which padding on the left would shift; rotary ones are relative

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        context: RoutingContext | None = None,
        experts_per_token: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> S2MoESequenceClassifierOutput:
        """Logits [B, C] and, given labels, the loss.

        Args:
            attention_mask: 0 for padding [B, S], on either side. Without one, the configuration's ``pad_token_id``
                says what is padding; without that too, every token is real.
            labels: classes [B], -100 for a text without one; for other kinds of problem as in transformers.
            num_items_in_batch: labels of all batches whose losses a trainer adds up; None takes the mean.
            context, experts_per_token: see S2MoEModel.forward.

        Raises:
            ValueError: if a text has no real token.
        """
        if attention_mask is None and self.config.pad_token_id is not None and input_ids is not None:
            attention_mask = input_ids.ne(self.config.pad_token_id).long()
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask: the last real token is found in a mask [B, S] only")
        if self.learned_positions and position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if use_cache is None else use_cache,
            context=context,
            experts_per_token=experts_per_token,
            return_dict=True,
            **kwargs,
        )
        logits_BC = self.score(last_real(outputs.last_hidden_state, attention_mask))

        loss = task_loss = None
        aux_loss = mean_loss(outputs.routing or (), logits_BC.device)
        if labels is not None:
            share = batch_share(labels, num_items_in_batch)
            mean = self.loss_function(labels=labels, pooled_logits=logits_BC.float(), config=self.config)
            if not labels.is_floating_point():
                mean = torch.where(labels.ne(-100).any(), mean, 0.0)  # of no label it is 0 / 0
            task_loss = mean * share  # the share of means over texts is what adds up to the mean over all batches
            loss = task_loss if aux_loss is None else task_loss + aux_loss * share
        told = labels is not None or self.training  # a pipeline splits all that is there by texts
        return S2MoESequenceClassifierOutput(
            loss=loss,
            logits=logits_BC,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            task_loss=task_loss,
            aux_loss=aux_loss if told else None,
            routing=outputs.routing if told else None,
        )


class S2MoEForSequenceClassification(LastTokenClassifier, S2MoEPreTrainedModel):
    """A linear classifier of ``config.num_labels`` classes. ``parallel`` as in S2MoEModel."""

    def __init__(self, config: S2MoEConfig, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config)
        self.model = S2MoEModel(config, parallel)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


def last_real(hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """The hidden state [B, D] of each text's last token that is not padding; of cached positions only the new count."""
    if mask_BS is None:
        return hidden_BSD[:, -1]
    new_BS = mask_BS[:, -hidden_BSD.shape[1] :].bool()
    if not new_BS.any(1).all():
        raise ValueError("a text has no real token: attention_mask is 0 everywhere in its row")
    position_S = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)
    last_B = position_S.where(new_BS, -1).amax(1)
    return hidden_BSD[torch.arange(len(last_B), device=last_B.device), last_B]
