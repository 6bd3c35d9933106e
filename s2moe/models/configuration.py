"""Configuration of the causal language model."""

import inspect
from dataclasses import asdict
from typing import Any, NamedTuple, get_args

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from s2moe.moe.config import MoEConfig, resolve_moe, typed_moe
from s2moe.moe.routers import ROUTERS, Router
from s2moe.options import option


class AttentionShape(NamedTuple):
    """Query heads, key/value heads, and the width of each."""

    query_heads: int
    value_heads: int
    width: int


@strict
class S2MoEConfig(PreTrainedConfig):
    """A pre-norm decoder with SMoE layers. ``moe`` holds the resolved options of ``s2moe.moe.config``.

    Raises:
        ValueError: on impossible sizes or unknown options, naming the key.
    """

    model_type = "s2moe"
    keys_to_ignore_at_inference = ["past_key_values", "routing", "task_loss", "aux_loss"]

    vocab_size: int = option(256, "symbols of the vocabulary; set by the corpus in pre-training")
    hidden_size: int = option(256, "width of the model")
    num_hidden_layers: int = option(4, "Transformer blocks")
    num_attention_heads: int = option(8, "query heads")
    num_key_value_heads: int | None = option(None, "key/value heads of grouped-query attention; null: as query heads")
    head_dim: int | None = option(None, "width of a head; null: hidden_size / num_attention_heads")
    intermediate_size: int = option(1024, "hidden width of the dense layers' MLP")
    max_position_embeddings: int = option(2048, "longest sequence")
    rms_norm_eps: float = option(1e-6, "epsilon of RMSNorm")
    rope_parameters: dict | None = option(None, "rotary embedding; null: theta 10000 without scaling")
    attention_dropout: float = option(0.0, "dropout of attention probabilities")
    hidden_dropout: float = option(0.0, "dropout of each residual branch")
    tie_word_embeddings: bool = option(False, "share input and output embedding")
    initializer_range: float = option(0.02, "standard deviation of the initial weights")
    use_cache: bool = option(True, "keep keys and values in generation")
    pad_token_id: int | None = option(None, "id of padding, where the tokenizer has one")
    bos_token_id: int | None = option(None, "id that begins a text, where the tokenizer has one")
    eos_token_id: int | None = option(None, "id that ends generation, where the tokenizer has one")
    moe: dict | None = option(None, "the SMoE layers, see below")

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        self._check_ranges()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: set head_dim, or change one of them"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions need pairs")
        moe = resolve_moe(self.moe)
        sparse = any(moe.is_sparse(layer) for layer in range(self.num_hidden_layers))
        if not sparse and moe.first_dense < self.num_hidden_layers:
            raise ValueError(
                f"moe.every={moe.every} leaves no SMoE layer among {self.num_hidden_layers} layers: lower it "
                f"(a dense model on purpose: moe.first_dense={self.num_hidden_layers})"
            )
        self._complete(moe)
        router = meta_router(moe, self.hidden_size)  # raises where its options and the model's sizes do not fit
        refusal = router.refuses_causal()
        if refusal:
            raise ValueError(f"moe.router.name={moe.router['name']} in a causal language model: {refusal}")
        self.moe = asdict(moe)
        super().__post_init__(**kwargs)
        rope_type, known = (self.rope_parameters or {})["rope_type"], ("default", *ROPE_INIT_FUNCTIONS)
        if rope_type not in known:
            raise ValueError(f"rope_parameters: unknown rope_type {rope_type!r}; known: {', '.join(known)}")

    def _complete(self, moe: MoEConfig) -> None:
        """Fill in what a router has to know of the model, where its options have a field for it and leave it null."""
        for name in ("vocab_size", "num_attention_heads"):
            if name in moe.router and moe.router[name] is None:
                moe.router[name] = getattr(self, name)
        if moe.router.get("vocab_size", self.vocab_size) < self.vocab_size:
            raise ValueError(
                f"moe.router.vocab_size {moe.router['vocab_size']} leaves tokens of the model's vocab_size "
                f"{self.vocab_size} without a route: leave it null"
            )
        if moe.router.get("num_attention_heads", self.num_attention_heads) != self.num_attention_heads:
            raise ValueError(
                f"moe.router.num_attention_heads {moe.router['num_attention_heads']} is not the model's "
                f"num_attention_heads {self.num_attention_heads}: leave it null"
            )

    def _check_types(self) -> None:
        """Before anything is computed from them; transformers itself checks only afterwards."""
        for name, hint in inspect.get_annotations(type(self)).items():
            allowed = get_args(hint) or (hint,)
            value = getattr(self, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
                continue
            if (type(value) is bool and bool not in allowed) or not isinstance(value, allowed):
                names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
                raise ValueError(f"{name}: expected {names}, got {value!r}")

    def _check_ranges(self) -> None:
        positive = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "intermediate_size max_position_embeddings"
        )
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' own. Raises ValueError for another type of model, whose weights would not be found."""
        require_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def attention_shape(self) -> AttentionShape:
        """The resolved sizes of attention."""
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        return AttentionShape(self.num_attention_heads, self.num_key_value_heads, self.head_dim)

    def moe_config(self) -> MoEConfig:
        """The typed options of the SMoE layers."""
        assert self.moe is not None  # set in __post_init__
        return typed_moe(self.moe)


def require_model_type(cls: type[PreTrainedConfig], values: dict[str, Any]) -> None:
    """Raise ValueError if these are of another type of model: transformers would warn, and draw all weights anew."""
    kind = values.get("model_type", cls.model_type)
    if kind != cls.model_type:
        raise ValueError(
            f"a model of type {kind!r} is no {cls.model_type!r}: transformers' Auto classes find the one that fits"
        )


def meta_router(moe: MoEConfig, hidden_size: int) -> Router:
    """The router of a layer of this width, without storage.

    Raises:
        ValueError: if it cannot be, the router's reason.
    """
    with torch.device("meta"):
        return ROUTERS[moe.router["name"]](hidden_size, moe.num_experts, moe.experts_per_token, moe.router_options())
