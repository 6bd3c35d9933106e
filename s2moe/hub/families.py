"""Models of other architectures with our SMoE layers in place of their MLPs.

For each family of transformers' models there is a configuration class (theirs, with ``moe``) and a causal language
model (theirs, with the layers exchanged), registered with the Auto classes under a model type of its own: a saved
model loads with ``import s2moe`` and is refused without, rather than read as the dense model that it is not.

``generate``, pipelines, Trainer and PEFT see an ordinary model. Its output is that of S2MoEForCausalLM: given
labels, ``loss`` holds the auxiliary losses, so whoever calls ``loss.backward()`` trains the routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.utils import can_return_tuple

from s2moe.hub.block import SparseMLP, context_block, sparse_blocks
from s2moe.models.modeling import S2MoECausalLMOutput, S2MoEForCausalLM, S2MoEModel
from s2moe.models.recomputation import WithoutReentrance
from s2moe.moe.config import MoEConfig, resolve_moe, typed_moe
from s2moe.moe.experts import Experts
from s2moe.moe.regularisers import Regularisers
from s2moe.moe.routers import ROUTERS, LinearScores, Router
from s2moe.moe.routing import LayerStatistics, RoutingContext

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
    """One architecture of transformers. ``moe_block`` names the class of MLPs that are mixtures already."""

    name: str
    config_name: str
    model_name: str
    layers: str = "layers"
    form: str = "gated"
    weights: Callable[[Any], DenseWeights] = gated_weights
    moe_block: str = ""
    refuse: Callable[[Any], str] = lambda config: ""

    @property
    def model_type(self) -> str:
        """That of the model with SMoE layers."""
        return f"s2moe_{self.name}"

    @property
    def theirs(self) -> type[PreTrainedModel]:
        """transformers' model class."""
        return getattr(transformers, self.model_name)

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


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaConfig", "LlamaForCausalLM", refuse=_llama_biases),
        Family("mistral", "MistralConfig", "MistralForCausalLM"),
        Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
        Family("gpt2", "GPT2Config", "GPT2LMHeadModel", layers="h", form="mlp", weights=gpt2_weights),
        Family("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", moe_block="Qwen2MoeSparseMoeBlock"),
        Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", moe_block="Qwen3MoeSparseMoeBlock"),
        Family("olmoe", "OlmoeConfig", "OlmoeForCausalLM", moe_block="OlmoeSparseMoeBlock"),
    )
}


def check_foreign(moe: MoEConfig) -> None:
    """Raise ValueError for a method that needs more of a block than another architecture's gives."""
    router = ROUTERS[moe.router["name"]]
    if router.wants_attention or router.keeps_history:
        raise ValueError(
            f"the router {moe.router['name']!r} needs the block's attention or its own place in the cache, which "
            "only S2MoEForCausalLM's blocks hand to it: choose another method"
        )
    momentum = moe.momentum
    if momentum.kind != "none" or momentum.sign != "add" or momentum.legacy_double_residual:
        raise ValueError(
            "momentum changes the residual stream between blocks, which only S2MoEForCausalLM's blocks do: "
            "set momentum.kind=none, or choose another method"
        )


_Theirs: Any = object  # transformers' class, which comes behind ours


class SparseConfigMixin(_Theirs):
    """A configuration of transformers with ``moe``, the resolved options of ``s2moe.moe.config``."""

    moe: dict[str, Any] | None
    keys_to_ignore_at_inference = ["past_key_values", "routing", "task_loss", "aux_loss"]
    base_model_tp_plan = None  # theirs are for the MLPs that are gone
    base_model_ep_plan = None

    def __post_init__(self, **kwargs: Any) -> None:
        moe = resolve_moe(self.moe)
        check_foreign(moe)
        self.moe = asdict(moe)
        super().__post_init__(**kwargs)

    def moe_config(self) -> MoEConfig:
        """The typed options of the SMoE layers."""
        assert self.moe is not None
        return typed_moe(self.moe)


class SparseModelMixin(WithoutReentrance, _Theirs):
    """A causal language model of transformers, whose MLPs are exchanged when it is built."""

    family: Family
    _can_compile_fullgraph = False  # how many rows an expert gets is known only when they are counted

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._forwards = 0
        moe = config.moe_config()
        for layer, block in enumerate(self.family.blocks(self)):
            block.__class__ = context_block(type(block))  # type: ignore[arg-type]
            if self.family.is_sparse(block, layer, moe):
                block.mlp = SparseMLP(
                    moe,
                    config.hidden_size,
                    layer,
                    bias=self.family.form == "mlp",
                    dropout=getattr(config, "resid_pdrop", 0.0),
                    shared_expert=getattr(block.mlp, "shared_expert", None),
                    shared_expert_gate=getattr(block.mlp, "shared_expert_gate", None),
                )
        if not sparse_blocks(self):
            raise ValueError(
                f"moe.every={moe.every} and moe.first_dense={moe.first_dense} leave no SMoE layer among "
                f"{config.num_hidden_layers} layers: lower them"
            )
        self.post_init()

    def initialize_weights(self) -> None:
        """Draw what was neither loaded nor drawn yet."""
        super().initialize_weights()
        fresh: list[Any] = [block for block in sparse_blocks(self) if not getattr(block, "_drawn", False)]
        with torch.no_grad(), guard_torch_init_functions():
            for block in fresh:
                for module in block.modules():
                    if isinstance(module, (Experts, LinearScores, Regularisers, Router)):
                        module.reset_parameters(self.config.initializer_range)
                block._drawn = not any(parameter.is_meta for parameter in block.parameters())

    _context = S2MoEModel._context
    _share = staticmethod(S2MoEForCausalLM._share)
    update_routers = S2MoEForCausalLM.update_routers

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        context: RoutingContext | None = None,
        experts_per_token: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> S2MoECausalLMOutput:
        """Logits [B, S, V] and, given labels, the loss in nats, auxiliary losses included.

        Arguments as S2MoEForCausalLM.forward's, others as those of transformers' model.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        embedded = input_ids if inputs_embeds is None else inputs_embeds
        assert embedded is not None
        context = replace(
            self._context(context, experts_per_token, attention_mask, embedded),
            layers=self.config.num_hidden_layers,
            token_T=None if input_ids is None else input_ids.reshape(-1),
            target_T=_targets(labels, shift_labels),
            attention_mask=attention_mask,
        )
        given = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels if labels is not None else shift_labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            routing_context=context,
            **{name: value for name, value in given.items() if value is not None},
            **kwargs,
        )
        routing = self._take_statistics()
        aux_loss = torch.stack([layer.loss.to(output.logits.device) for layer in routing]).mean()
        loss = output.loss
        if loss is not None:
            loss = loss + aux_loss * self._share(labels, shift_labels, num_items_in_batch)
        return S2MoECausalLMOutput(
            loss=loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            task_loss=output.loss,
            aux_loss=aux_loss,
            routing=routing,
        )

    def _take_statistics(self) -> tuple[LayerStatistics, ...]:
        taken = []
        for block in sparse_blocks(self):
            assert block.statistics is not None
            taken.append(block.statistics)
            block.statistics = None
        return tuple(taken)


@contextmanager
def undrawn_experts() -> Iterator[None]:
    """Within it, experts are built without drawing their weights, which the caller fills in: it would take long."""
    with mock.patch.object(Experts, "reset_parameters", return_value=None):
        yield


def _targets(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    if shift_labels is None and labels is not None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return None if shift_labels is None else shift_labels.reshape(-1)


def _classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The family's configuration and model with SMoE layers."""
    config_name, model_name = f"Sparse{family.config_name}", f"Sparse{family.model_name}"
    config = type(
        config_name,
        (SparseConfigMixin, family.their_config),
        {
            "__module__": __name__,
            "__qualname__": config_name,
            "__annotations__": {"moe": dict | None},
            "model_type": family.model_type,
            "moe": None,
        },
    )
    model = type(
        model_name,
        (SparseModelMixin, family.theirs),
        {"__module__": __name__, "__qualname__": model_name, "config_class": config, "family": family},
    )
    return strict(config), model


CONFIGS: dict[str, type[Any]] = {}  # by the family's name
MODELS: dict[str, type[Any]] = {}


def register_families() -> None:
    """Make the classes, and register them with the Auto classes. Once, on import of the package."""
    for name, family in FAMILIES.items():
        CONFIGS[name], MODELS[name] = _classes(family)
        for cls in (CONFIGS[name], MODELS[name]):
            globals()[cls.__name__] = cls  # pickle looks them up here
        AutoConfig.register(family.model_type, CONFIGS[name])
        AutoModelForCausalLM.register(CONFIGS[name], MODELS[name])


def family_of(model: nn.Module) -> Family:
    """The family of one of transformers' models, or of one with our layers.

    Raises:
        ValueError: there is none, or the model has what SMoE layers cannot take over.
    """
    if isinstance(model, SparseModelMixin):
        return model.family
    for family in FAMILIES.values():
        if type(model) is family.theirs:
            problem = family.refuse(model.config)
            if problem:
                raise ValueError(f"{family.model_name} with {problem}")
            return family
    known = ", ".join(family.model_name for family in FAMILIES.values())
    raise ValueError(f"{type(model).__name__} is none of the architectures known here: {known}")
