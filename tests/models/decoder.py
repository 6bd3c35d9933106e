"""The language model in evaluation, written from the equations, in float64, one position at a time.

Pre-norm decoder (RMSNorm, rotary positions, grouped-query attention, dense MLP or mixture of experts,
residuals). Nothing here calls the code under test but to read its parameters.

Legend: S sequence, D model, H query heads, G key/value heads, C head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
from tests.moe import reference

SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough for routing and attention to be far from uniform
}
# A float64 model's angles are float32, whose sines may round otherwise in a tensor of another length.
ROTARY = {"rtol": 1e-5, "atol": 1e-5}


def tiny(method: str = "smoe", router: dict[str, Any] | None = None, **given: Any) -> S2MoEForCausalLM:
    """A random model of a few thousand parameters, in training mode and float32.

    Keys of the SMoE layers are given as ``moe_<key>``, the others are S2MoEConfig's.
    """
    moe = {"method": method, "num_experts": 4, "expert_hidden": 8, "router": router or {}}
    moe |= {key.removeprefix("moe_"): given.pop(key) for key in list(given) if key.startswith("moe_")}
    model = S2MoEForCausalLM(S2MoEConfig(**{**SIZES, **given}, moe=moe))
    for name, parameter in model.named_parameters():
        if "norm" in name or parameter.dim() == 1:  # which start as constants
            torch.nn.init.normal_(parameter, mean=0.7, std=0.2)
    return model.train()


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_D / ((x_D**2).mean() + eps) ** 0.5 * weight_D


def rotate(x_C: Tensor, position: int, theta: float) -> Tensor:
    """Turn the pair (i, i + C/2) by position · theta^(−2i/C) (RoFormer, in Llama's order of pairs)."""
    half = len(x_C) // 2
    first, second = [], []
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / len(x_C)), dtype=x_C.dtype)
        first.append(x_C[i] * angle.cos() - x_C[i + half] * angle.sin())
        second.append(x_C[i + half] * angle.cos() + x_C[i] * angle.sin())
    return torch.stack(first + second)


def attention(block: Any, rows_SD: list[Tensor], config: S2MoEConfig) -> list[Tensor]:
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]

    def heads_of(projection: Any, x_D: Tensor, count: int) -> list[Tensor]:
        return list((projection.weight @ x_D).view(count, width))

    queries = [[rotate(q, s, theta) for q in heads_of(block.q_proj, x, heads)] for s, x in enumerate(rows_SD)]
    keys = [[rotate(k, s, theta) for k in heads_of(block.k_proj, x, groups)] for s, x in enumerate(rows_SD)]
    values = [heads_of(block.v_proj, x, groups) for x in rows_SD]
    out = []
    for s in range(len(rows_SD)):
        mixed = []
        for h in range(heads):
            g = h // (heads // groups)
            scores = torch.stack([queries[s][h] @ keys[past][g] for past in range(s + 1)]) / width**0.5
            prob = reference.normalise_exp(scores)
            mixed.append(sum(prob[past] * values[past][g] for past in range(s + 1)))
        out.append(block.o_proj.weight @ torch.cat(mixed))
    return out


def dense_mlp(mlp: Any, x_D: Tensor, form: str, activation: str) -> Tensor:
    if form == "gated":
        return reference.expert_mlp(x_D, mlp.gate.weight, mlp.down.weight, mlp.up.weight, form, activation)
    return reference.expert_mlp(x_D, mlp.up.weight, mlp.down.weight, mlp.up.bias[None], form, activation)


def logits(model: S2MoEForCausalLM, ids: list[int], experts_per_token: int | None = None) -> Tensor:
    """[S, V], for a plain top-k router with the default rule of combination."""
    config, eps = model.config, model.config.rms_norm_eps
    moe = config.moe_config()
    rows = [model.model.embed_tokens.weight[i] for i in ids]
    for number, layer in enumerate(model.model.layers):
        normed = [rms_norm(x, layer.attention_norm.weight, eps) for x in rows]
        attended = attention(layer.attention, normed, config)
        rows = [x + a for x, a in zip(rows, attended, strict=True)]
        normed = [rms_norm(x, layer.mlp_norm.weight, eps) for x in rows]
        sparse = number >= moe.first_dense and (number - moe.first_dense + 1) % moe.every == 0
        if sparse:
            experts = [layer.moe.experts.w1, layer.moe.experts.w2, layer.moe.experts.w3]
            k = experts_per_token or moe.experts_per_token
            choices = [reference.choose(layer.moe.router.scores.weight @ x, k) for x in normed]
            mixed = list(reference.mixture(torch.stack(normed), choices, experts, moe.expert_form, moe.activation))
            if moe.shared_experts:
                extra = [dense_mlp(layer.moe.shared, x, moe.expert_form, moe.activation) for x in normed]
                mixed = [m + e for m, e in zip(mixed, extra, strict=True)]
        else:
            mixed = [dense_mlp(layer.mlp, x, moe.expert_form, moe.activation) for x in normed]
        rows = [x + m for x, m in zip(rows, mixed, strict=True)]
    head = model.model.embed_tokens.weight if config.tie_word_embeddings else model.lm_head.weight
    return torch.stack([head @ rms_norm(x, model.model.norm.weight, eps) for x in rows])
