"""Causal grouped-query attention with rotary positions, through transformers' attention interface.

Legend: B batch, S sequence, D model, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from s2moe.models.configuration import S2MoEConfig
from s2moe.moe.routing import AttentionState
from s2moe.precision import KeepsBuffers


class S2MoERotaryEmbedding(KeepsBuffers):
    """cos and sin of each position's angles, [B, S, C], computed in float32."""

    inv_freq: Tensor

    def __init__(self, config: S2MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = (config.rope_parameters or {})["rope_type"]
        initialise = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = initialise(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: S2MoEConfig, device: torch.device | None = None, seq_len: int | None = None
    ) -> tuple[Tensor, float]:
        """Inverse frequencies theta^(-2i/C), and the factor of cos and sin (1)."""
        width = config.attention_shape().width
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return (config.rope_parameters or {})["rope_theta"] ** -exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_BSD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq.to(device=hidden_BSD.device, dtype=torch.float32)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return cos.to(hidden_BSD.dtype), sin.to(hidden_BSD.dtype)


class S2MoEAttention(nn.Module):
    """Multi-head attention; ``num_key_value_heads`` below the query heads makes it grouped-query."""

    def __init__(self, config: S2MoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, groups, self.head_dim = config.attention_shape()
        self.num_key_value_groups = heads // groups
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_width, value_width = heads * self.head_dim, groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, AttentionState]:
        """[B, S, D] to [B, S, D]; with eager attention the probabilities [B, H, S, S']; and what it was made of."""
        lead = hidden_BSD.shape[:-1]
        query_BHSC = self.q_proj(hidden_BSD).view(*lead, -1, self.head_dim).transpose(1, 2)
        key_BGSC = self.k_proj(hidden_BSD).view(*lead, -1, self.head_dim).transpose(1, 2)
        value_BGSC = self.v_proj(hidden_BSD).view(*lead, -1, self.head_dim).transpose(1, 2)
        query_BHSC, key_BGSC = apply_rotary_pos_emb(query_BHSC, key_BGSC, *position_embeddings)
        if past_key_values is not None:
            key_BGSC, value_BGSC = past_key_values.update(key_BGSC, value_BGSC, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out_BSHC, probability = attend(
            self,
            query_BHSC,
            key_BGSC,
            value_BGSC,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        state = AttentionState(query_BHSC, key_BGSC, value_BGSC, out_BSHC, self.scaling)
        return self.o_proj(out_BSHC.reshape(*lead, -1).contiguous()), probability, state
