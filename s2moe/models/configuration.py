"""Configuration of the causal language model."""

import inspect
from dataclasses import asdict
from typing import Any, NamedTuple, get_args

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from s2moe.moe.config import MoEConfig, resolve_moe, typed_moe
from s2moe.moe.routers import ROUTERS, Router
from s2moe.options import LARGEST, Limits, check_fields, nearest, option

ROPE_KEYS: dict[str, tuple[str, str]] = {  # by rope_type: keys that must be given, and that may be, beside rope_theta
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", ""),
    "yarn": (
        "factor original_max_position_embeddings",
        "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
    ),
    "longrope": ("short_factor long_factor original_max_position_embeddings", "attention_factor factor"),
    "llama3": ("factor original_max_position_embeddings low_freq_factor high_freq_factor", ""),
}


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

    vocab_size: int = option(256, "symbols of the vocabulary; set by the corpus in pre-training", least=1, most=2**24)
    hidden_size: int = option(256, "width of the model", least=1, most=LARGEST)
    num_hidden_layers: int = option(4, "Transformer blocks", least=1, most=10_000)
    num_attention_heads: int = option(8, "query heads", least=1, most=LARGEST)
    num_key_value_heads: int | None = option(
        None, "key/value heads of grouped-query attention; null: as query heads", least=1, most=LARGEST
    )
    head_dim: int | None = option(
        None, "width of a head; null: hidden_size / num_attention_heads", least=1, most=LARGEST
    )
    intermediate_size: int = option(
        1024, "hidden width of the dense layers' MLP", least=1, most=LARGEST, needs="dense layers"
    )
    max_position_embeddings: int = option(2048, "longest sequence", least=1, most=2**30)
    rms_norm_eps: float = option(1e-6, "epsilon of RMSNorm", above=0, most=1)
    rope_parameters: dict | None = option(None, "rotary embedding; null: theta 10000 without scaling")
    attention_dropout: float = option(0.0, "dropout of attention probabilities", least=0, below=1)
    hidden_dropout: float = option(0.0, "dropout of each residual branch", least=0, below=1)
    tie_word_embeddings: bool = option(False, "share input and output embedding")
    initializer_range: float = option(0.02, "standard deviation of the initial weights", least=0)
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
        check_rope(self.rope_parameters or {})
        super().__post_init__(**kwargs)

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
        check_fields(self)

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


def check_rope(rope: dict[str, Any]) -> None:
    """Raise ValueError unless these are a rotary embedding's parameters: transformers would ignore an unknown key."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_parameters: unknown rope_type {kind!r}; known: {', '.join(ROPE_KEYS)}")
    required, optional = (names.split() for names in ROPE_KEYS[kind])
    missing = [name for name in required if name not in rope]
    if missing:
        raise ValueError(f"rope_parameters: rope_type={kind} needs {', '.join(missing)}")
    known = ("rope_type", "type", "rope_theta", *required, *optional)
    for name, value in rope.items():
        whole = name == "partial_rotary_factor" and value == 1.0  # as other models' configurations say it
        if name not in known and not whole:
            raise ValueError(f"rope_parameters: rope_type={kind} has no key {name!r}{nearest(name, known)}")
        if name in ("rope_theta", "factor") and Limits(above=0).broken_rule(value):
            raise ValueError(f"rope_parameters: {name} {Limits(above=0).broken_rule(value)}, got {value!r}")


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
