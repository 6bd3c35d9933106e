"""The causal language model: a transformers PreTrainedModel with SMoE layers.

Legend: B batch, S sequence, T = B S tokens, D model, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from s2moe.models.attention import S2MoEAttention, S2MoERotaryEmbedding
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.routed import (
    RoutedModel,
    S2MoECausalLMOutput,
    S2MoEModelOutput,
    aligned_targets,
    batch_share,
    label_count,
    mean_loss,
)
from s2moe.moe.experts import Experts
from s2moe.moe.history import History, same_document
from s2moe.moe.layer import DenseMLP, SMoELayer, build_layer
from s2moe.moe.momentum import MomentumState, build_momentum
from s2moe.moe.regularisers import Regularisers
from s2moe.moe.routers import ROUTERS, LinearScores, Router
from s2moe.moe.routing import LayerStatistics, RoutingContext
from s2moe.parallel import ExpertParallel


class S2MoERMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 inside."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class S2MoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and an SMoE (or dense) MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: S2MoEConfig, layer_idx: int, parallel: ExpertParallel | None) -> None:
        super().__init__()
        moe = config.moe_config()
        self.is_sparse = moe.is_sparse(layer_idx)
        self.attention_norm = S2MoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = S2MoEAttention(config, layer_idx)
        self.mlp_norm = S2MoERMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.is_sparse:
            self.moe: SMoELayer = build_layer(moe, config.hidden_size, layer_idx, parallel)
        else:
            self.mlp = DenseMLP(config.hidden_size, config.intermediate_size, moe.expert_form, moe.activation)
        self.dropout = nn.Dropout(config.hidden_dropout)
        sparse_before = sum(moe.is_sparse(layer) for layer in range(layer_idx))
        self.history_slot = config.num_hidden_layers + sparse_before
        self.momentum_update = build_momentum(moe.momentum, sparse_before) if self.is_sparse else None
        if self.is_sparse and moe.momentum.legacy_double_residual:
            self.residual_norm = S2MoERMSNorm(config.hidden_size, config.rms_norm_eps)

    def history(self, cache: Cache) -> History:
        """Where this block's router keeps what it has to know of earlier positions: behind the attention's layers."""
        return History(cache, self.history_slot)

    def forward(
        self,
        hidden_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        context: RoutingContext | None = None,
        momentum: MomentumState | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, LayerStatistics | None, MomentumState | None]:
        """Hidden states [B, S, D] after the block; eager attention's probabilities; statistics; MomentumSMoE's state.

        Args:
            momentum: that state, as the block before returned it; None before the first.
        """
        attended, probability, attention = self.attention(
            self.attention_norm(hidden_BSD), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_BSD = hidden_BSD + self.dropout(attended)
        update = self.momentum_update
        normed_BSD = self.mlp_norm(hidden_BSD if update is None else update.look_ahead(hidden_BSD, momentum))
        statistics = None
        if self.is_sparse:
            router = self.moe.router
            context = replace(
                context or RoutingContext(),
                attention=attention if router.wants_attention else None,
                history=self.history(past_key_values) if router.keeps_history and past_key_values is not None else None,
            )
            mixed, statistics = self.moe(normed_BSD, context)
        else:
            mixed = self.mlp(normed_BSD)
        step_BSD = self.dropout(mixed)
        if update is not None:
            step_BSD, momentum = update.step(hidden_BSD, step_BSD, momentum)
            if update.options.legacy_double_residual:
                step_BSD = self.residual_norm(hidden_BSD + step_BSD)
        return hidden_BSD + step_BSD, probability, statistics, momentum


class S2MoEPreTrainedModel(RoutedModel, PreTrainedModel):
    """Weight initialisation and what transformers needs to know of the architecture."""

    config: S2MoEConfig
    config_class = S2MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["S2MoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Experts, LinearScores, Regularisers, Router)):
            module.reset_parameters(self.config.initializer_range)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """transformers' own; a router that has rows of its own for the tokens gets those that it lacks."""
        embeddings: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        rows = self.config.vocab_size
        options = (self.config.moe or {})["router"]
        if options.get("vocab_size", rows) < rows:
            for module in self.modules():
                if isinstance(module, Router):
                    module.add_tokens(rows)
            options["vocab_size"] = rows
        return embeddings


class S2MoEModel(S2MoEPreTrainedModel):
    """Embedding, blocks, final norm.

    Args:
        parallel: where the experts live; None for a single process.
    """

    def __init__(self, config: S2MoEConfig, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # padding too has a row that learns
        self.layers = nn.ModuleList(
            S2MoEDecoderLayer(config, index, parallel) for index in range(config.num_hidden_layers)
        )
        self.norm = S2MoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = S2MoERotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        router = ROUTERS[config.moe_config().router["name"]]
        self._looks_back = router.wants_attention or router.keeps_history
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        context: RoutingContext | None = None,
        experts_per_token: int | None = None,
        target_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> S2MoEModelOutput:
        """Hidden states [B, S, D] after the final norm.

        Args:
            context: keys the layers' randomness in training. Without one it is keyed by torch's seed,
                the rank, and the number of training forwards of this process so far.
            experts_per_token: k' of a slimmed evaluation; None keeps the trained k.
            target_ids: what is to be predicted at each position [B, S], for objectives on hidden states.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        # Only positions that were given are passed on: transformers reads them to look for packed
        # sequences, which waits for the device.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        else:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        looked_at = attention_mask
        if self._looks_back and attention_mask is None and past_key_values is None and "position_ids" in kwargs:
            looked_at = same_document(position_ids)  # as transformers masks attention: documents may be packed
        context = self._context(context, experts_per_token, looked_at, input_ids, inputs_embeds, target_ids)

        hidden_BSD = self.dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_BSD, position_ids)
        wants_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_probability = self.config.output_attentions if output_attentions is None else output_attentions
        every_hidden, every_probability, routing = [hidden_BSD], [], []
        momentum: MomentumState | None = None
        for layer in self.layers:
            hidden_BSD, probability, statistics, momentum = layer(
                hidden_BSD,
                position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                context=context,
                momentum=momentum,
                **kwargs,
            )
            if wants_hidden:
                every_hidden.append(hidden_BSD)
            if wants_probability:
                every_probability.append(probability)
            if statistics is not None:
                routing.append(statistics)
        hidden_BSD = self.norm(hidden_BSD)
        every_hidden[-1] = hidden_BSD
        return S2MoEModelOutput(
            last_hidden_state=hidden_BSD,
            past_key_values=past_key_values,
            hidden_states=tuple(every_hidden) if wants_hidden else None,
            attentions=tuple(every_probability) if wants_probability else None,
            routing=tuple(routing),
        )


class S2MoEForCausalLM(S2MoEPreTrainedModel, GenerationMixin):
    """The language model. ``parallel`` as in S2MoEModel."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: S2MoEConfig, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config)
        self.model = S2MoEModel(config, parallel)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        logits_to_keep: int | Tensor = 0,
        context: RoutingContext | None = None,
        experts_per_token: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> S2MoECausalLMOutput:
        """Logits [B, S, V] and, given labels, the loss in nats.

        Args:
            labels: token ids [B, S], shifted here so that position s predicts label s + 1.
            shift_labels: ids [B, S] already aligned: position s predicts entry s. -100 is ignored. Among ``kwargs``,
                as in transformers, whose Trainer takes every parameter with such a name for a label that must be there.
            num_items_in_batch: divisor of the summed cross-entropy, where a trainer accumulates
                gradients over batches; None takes the mean.
            logits_to_keep: only the last so many positions' logits (0: all), or those at an index tensor.
            context, experts_per_token: see S2MoEModel.forward.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        targets_BS = aligned_targets(labels, shift_labels)
        outputs = self.model(
            input_ids=input_ids,
            target_ids=targets_BS,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            context=context,
            experts_per_token=experts_per_token,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = task_loss = None
        aux_loss = mean_loss(outputs.routing, logits_BSV.device)
        if targets_BS is not None:
            if logits_BSV.shape[1] != outputs.last_hidden_state.shape[1]:
                raise ValueError("labels need the logits of every position: leave logits_to_keep at 0")
            task_loss = self.loss_function(
                logits=logits_BSV,
                labels=labels,
                shift_labels=shift_labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=label_count(targets_BS, num_items_in_batch),
            )
            loss = task_loss
            if aux_loss is not None:
                loss = task_loss + aux_loss * batch_share(targets_BS, num_items_in_batch)
        return S2MoECausalLMOutput(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            task_loss=task_loss,
            aux_loss=aux_loss,
            routing=outputs.routing,
        )
