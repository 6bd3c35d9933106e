"""Models of other architectures with our SMoE layers in place of their MLPs.

For each family of transformers' models there is a configuration class (theirs, with ``moe``), a model without a head,
a causal language model and a classifier (theirs, with the layers exchanged), registered with the Auto classes under a
model type of its own: a saved model loads with ``import s2moe`` and is refused without, rather than read as the dense
model that it is not.

``generate``, pipelines, Trainer and PEFT see ordinary models. Their outputs are those of S2MoEForCausalLM and
S2MoEForSequenceClassification: given labels, ``loss`` holds the auxiliary losses, so whoever calls
``loss.backward()`` trains the routers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.initialization import guard_torch_init_functions
from transformers.utils import can_return_tuple

from s2moe.hub.block import SparseMLP, context_block, sparse_blocks
from s2moe.hub.families import FAMILIES, Family
from s2moe.models.classification import LastTokenClassifier
from s2moe.models.configuration import require_model_type
from s2moe.models.routed import (
    RoutedModel,
    S2MoECausalLMOutput,
    S2MoEModelOutput,
    aligned_targets,
    batch_share,
    label_count,
    mean_loss,
)
from s2moe.moe.config import MoEConfig, resolve_moe, typed_moe
from s2moe.moe.experts import Experts
from s2moe.moe.regularisers import Regularisers
from s2moe.moe.routers import ROUTERS, LinearScores, Router
from s2moe.moe.routing import LayerStatistics, RoutingContext
from s2moe.parallel import ExpertParallel

ROUTER_LOGITS = (
    "our layers have none; the balance loss is part of the loss without it, and outputs hold `routing`, each layer's "
    "load and figures"
)

_Theirs: Any = object  # transformers' class, which comes behind ours


def check_foreign(moe: MoEConfig) -> None:
    """Raise ValueError for a method that needs more of a block than another architecture's gives."""
    router = ROUTERS[moe.router["name"]]
    if router.wants_attention or router.keeps_history:
        raise ValueError(
            f"the router {moe.router['name']!r} needs the block's attention or its own place in the cache, which "
            "only S2MoEForCausalLM's blocks hand to it: choose another method"
        )
    if moves_between_layers(moe):
        raise ValueError(
            "momentum changes the residual stream between blocks, which only S2MoEForCausalLM's blocks do: "
            "set momentum.kind=none, or choose another method"
        )


def moves_between_layers(moe: MoEConfig) -> bool:
    """Whether MomentumSMoE, or a sign or residual of its own, changes the residual stream between blocks."""
    momentum = moe.momentum
    return momentum.kind != "none" or momentum.sign != "add" or momentum.legacy_double_residual


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
        if getattr(self, "output_router_logits", False):
            self.output_router_logits = False
            warnings.warn(f"output_router_logits: {ROUTER_LOGITS}", stacklevel=2)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' own. Raises ValueError for another type of model, whose weights would not be found."""
        require_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def moe_config(self) -> MoEConfig:
        """The typed options of the SMoE layers."""
        assert self.moe is not None
        return typed_moe(self.moe)


class SparseModelMixin(RoutedModel, _Theirs):
    """A model of transformers with SMoE layers."""

    family: Family
    _can_compile_fullgraph = False  # how many rows an expert gets is known only when they are counted

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


class ExchangedMixin(SparseModelMixin):
    """One of transformers' own models, whose MLPs are exchanged when it is built.

    Args:
        parallel: where the experts live; None for a single process.
    """

    def __init__(self, config: Any, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config)
        moe = config.moe_config()
        for layer, block in enumerate(self.family.blocks(self)):
            block.__class__ = context_block(type(block))  # type: ignore[arg-type]
            if self.family.is_sparse(block, layer, moe):
                block.mlp = SparseMLP(
                    moe,
                    config.hidden_size,
                    layer,
                    parallel,
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

    def _refuse_router_logits(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_router_logits") or getattr(self.config, "output_router_logits", False):
            raise ValueError(f"output_router_logits=True: {ROUTER_LOGITS}")

    def _take_statistics(self) -> tuple[LayerStatistics, ...]:
        taken = []
        for block in sparse_blocks(self):
            assert block.statistics is not None
            taken.append(block.statistics)
            block.statistics = None
        return tuple(taken)


class SparseBaseMixin(ExchangedMixin):
    """Without a head."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        context: RoutingContext | None = None,
        experts_per_token: int | None = None,
        **kwargs: Any,
    ) -> S2MoEModelOutput:
        """Hidden states [B, S, D]. Arguments as S2MoEModel.forward's, others as those of transformers' model."""
        self._refuse_router_logits(kwargs)
        context = self._context(context, experts_per_token, attention_mask, input_ids, inputs_embeds, None)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            routing_context=context,
            **{**kwargs, "return_dict": True},
        )
        return S2MoEModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            routing=self._take_statistics(),
        )


class SparseCausalLMMixin(ExchangedMixin):
    """A causal language model."""

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
        target_BS = aligned_targets(labels, shift_labels)
        self._refuse_router_logits(kwargs)
        context = self._context(context, experts_per_token, attention_mask, input_ids, inputs_embeds, target_BS)
        given: dict[str, Any] = {"shift_labels": shift_labels}
        if target_BS is not None:
            given["num_items_in_batch"] = label_count(target_BS, num_items_in_batch)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels if labels is not None else shift_labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            routing_context=context,
            **{name: value for name, value in given.items() if value is not None},
            **{**kwargs, "return_dict": True},
        )
        routing = self._take_statistics()
        aux_loss, loss = mean_loss(routing, output.logits.device), output.loss
        if target_BS is not None and aux_loss is not None:
            loss = loss + aux_loss * batch_share(target_BS, num_items_in_batch)
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


class SparseClassifierMixin(LastTokenClassifier, SparseModelMixin):
    """A classifier on the last real token, as S2MoEForSequenceClassification. ``parallel`` as in ExchangedMixin."""

    base: type[Any]  # the family's model without a head

    def __init__(self, config: Any, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.base(config, parallel))
        self.num_labels = config.num_labels
        self.learned_positions = self.family.learned_positions
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


@contextmanager
def undrawn_experts() -> Iterator[None]:
    """Within it, experts are built without drawing their weights, which the caller fills in: it would take long."""
    with mock.patch.object(Experts, "reset_parameters", return_value=None):
        yield


def _class(name: str, bases: tuple[type, ...], **contents: Any) -> type[Any]:
    made = type(name, bases, {"__module__": __name__, "__qualname__": name, **contents})
    globals()[name] = made  # pickle looks them up here
    return made


CONFIGS: dict[str, type[Any]] = {}  # by the family's name
MODELS: dict[str, type[Any]] = {}  # causal language models


def register_families() -> None:
    """Make the classes, and register them with the Auto classes. Once, on import of the package."""
    for name, family in FAMILIES.items():
        stem = f"Sparse{family.config_name.removesuffix('Config')}"
        config = strict(
            _class(
                f"{stem}Config",
                (SparseConfigMixin, family.their_config),
                __annotations__={"moe": dict | None},
                model_type=family.model_type,
                moe=None,
                attribute_map=family.their_config.attribute_map | family.our_names,
            )
        )
        own = {"config_class": config, "family": family}
        pretrained = family.their_base.__mro__[1]  # the family's PreTrainedModel
        base = _class(f"{stem}Model", (SparseBaseMixin, family.their_base), **own)
        model = _class(f"Sparse{family.model_name}", (SparseCausalLMMixin, family.theirs), **own)
        classifier = _class(f"{stem}ForSequenceClassification", (SparseClassifierMixin, pretrained), base=base, **own)
        AutoConfig.register(family.model_type, config)
        AutoModel.register(config, base)
        AutoModelForCausalLM.register(config, model)
        AutoModelForSequenceClassification.register(config, classifier)
        CONFIGS[name], MODELS[name] = config, model
