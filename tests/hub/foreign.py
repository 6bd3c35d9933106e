"""Tiny random models of transformers' own architectures."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough for routing and attention to be far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 6}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_inner": 24, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0}),
}


def foreign(name: str, **given: Any) -> PreTrainedModel:
    """A random model in evaluation mode and float32, whose norms and biases are not the constants they start as."""
    config_name, model_name, own = MODELS[name]
    sizes = SIZES if name == "gpt2" else {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24}
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**{**sizes, **own, **given}))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.7, std=0.2)
    return model.eval()


def ids(batch: int = 2, length: int = 9, seed: int = 5) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
