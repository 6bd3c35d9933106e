"""The architectures of transformers that take our SMoE layers in place of their MLPs, and how each has its MLPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from s2moe.moe.config import MoEConfig

# Their activations that we have, by their names.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class DenseWeights(NamedTuple):
    """A dense MLP in the form of one expert: w1 [F, D], w2 [D, F], w3 [F, D] or the hidden bias [1, F], bias [D]."""

    w1: Tensor
    w2: Tensor
    w3: Tensor
    bias: Tensor | None = None


def gated_weights(mlp: Any) -> DenseWeights:
    """Of down(act(gate(x)) * up(x))."""
    return DenseWeights(mlp.gate_proj.weight, mlp.down_proj.weight, mlp.up_proj.weight)


def gpt2_weights(mlp: Any) -> DenseWeights:
    """Of c_proj(act(c_fc(x))), whose matrices are stored transposed."""
    return DenseWeights(mlp.c_fc.weight.T, mlp.c_proj.weight.T, mlp.c_fc.bias[None], mlp.c_proj.bias)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    ``moe_block`` names the class of MLPs that are mixtures already; ``learned_positions`` says that its positions have
    embeddings, which count from the first token, padding included; ``our_names`` are S2MoEConfig's of its options.
    """

    name: str
    config_name: str
    model_name: str
    layers: str = "layers"
    form: str = "gated"
    weights: Callable[[Any], DenseWeights] = gated_weights
    moe_block: str = ""
    learned_positions: bool = False
    our_names: dict[str, str] = field(default_factory=dict)
    refuse: Callable[[Any], str] = lambda config: ""

    @property
    def model_type(self) -> str:
        """That of the model with SMoE layers."""
        return f"s2moe_{self.name}"

    @property
    def theirs(self) -> type[PreTrainedModel]:
        """transformers' causal language model."""
        return getattr(transformers, self.model_name)

    @property
    def their_base(self) -> type[PreTrainedModel]:
        """transformers' model without a head."""
        return getattr(transformers, self.config_name.replace("Config", "Model"))

    @property
    def their_config(self) -> type[PreTrainedConfig]:
        """transformers' configuration class."""
        return getattr(transformers, self.config_name)

    def blocks(self, model: Any) -> Any:
        """The Transformer blocks, each with its ``mlp``."""
        return getattr(model.base_model, self.layers)

    def is_sparse(self, block: Any, layer: int, moe: MoEConfig) -> bool:
        """Whether this block's MLP is, or becomes, an SMoE layer."""
        return type(block.mlp).__name__ == self.moe_block if self.moe_block else moe.is_sparse(layer)


def _llama_biases(config: Any) -> str:
    return "mlp_bias=true: experts have no biases in the gated form" if config.mlp_bias else ""


GPT2: dict[str, Any] = {"learned_positions": True, "our_names": {"hidden_dropout": "resid_pdrop"}}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaConfig", "LlamaForCausalLM", refuse=_llama_biases),
        Family("mistral", "MistralConfig", "MistralForCausalLM"),
        Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
        Family("gpt2", "GPT2Config", "GPT2LMHeadModel", "h", "mlp", gpt2_weights, **GPT2),
        Family("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", moe_block="Qwen2MoeSparseMoeBlock"),
        Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", moe_block="Qwen3MoeSparseMoeBlock"),
        Family("olmoe", "OlmoeConfig", "OlmoeForCausalLM", moe_block="OlmoeSparseMoeBlock"),
    )
}


def family_of(model: nn.Module) -> Family:
    """The family of one of transformers' models, or of one with our layers.

    Raises:
        ValueError: there is none, or the model has what SMoE layers cannot take over.
    """
    found = getattr(model, "family", None)
    if isinstance(found, Family):
        return found
    for family in FAMILIES.values():
        if type(model) is family.theirs:
            problem = family.refuse(model.config)
            if problem:
                raise ValueError(f"{family.model_name} with {problem}")
            return family
    known = ", ".join(family.model_name for family in FAMILIES.values())
    raise ValueError(f"{type(model).__name__} is none of the architectures known here: {known}")
