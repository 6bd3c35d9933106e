"""Checkpoints of transformers' own architectures in, and out again where they can express the model.

in    Llama, Mistral (without sliding window), Mixtral       S2MoEForCausalLM, whose blocks are the same
      Qwen2-MoE, Qwen3-MoE, OLMoE                            the same model with our SMoE layers in it
out   S2MoEForCausalLM                                       Llama (dense), Mixtral, else Qwen2-MoE
      models with our layers in them                         Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE

Out goes what is plain top-k routing in evaluation: softmax, the k largest, renormalised or not. What only training
has (S2MoE's noise, auxiliary losses, capacity) is left behind; the rest is refused. No weight is rounded: in float32
logits agree to the last bits. (In bfloat16 our routers compute in float32 and theirs do not.)

Qwen2-MoE is the most general of them: dense layers anywhere, weights that are not renormalised, and shared experts,
whose gate σ(0) = 1/2 is made up for by doubling their last matrix.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from s2moe.hub.families import ACTIVATIONS, family_of
from s2moe.hub.sparse_models import CONFIGS, MODELS, SparseModelMixin, undrawn_experts
from s2moe.models import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.config import MoEConfig

State = dict[str, Tensor]

OURS_AND_LLAMA = (  # names of the same weights
    (".attention_norm.", ".input_layernorm."),
    (".attention.", ".self_attn."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".mlp.gate.", ".mlp.gate_proj."),
    (".mlp.up.", ".mlp.up_proj."),
    (".mlp.down.", ".mlp.down_proj."),
    (".moe.shared.gate.", ".mlp.shared_expert.gate_proj."),
    (".moe.shared.up.", ".mlp.shared_expert.up_proj."),
    (".moe.shared.down.", ".mlp.shared_expert.down_proj."),
)
THEIR_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SPARSE_OF_DENSE = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


@torch.no_grad()
def from_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """A model of transformers as one with our SMoE layers; it computes the same.

    The result has the routing method ``smoe`` with the checkpoint's rule of weights; its balance loss has the
    coefficient ``router_aux_loss_coef``, times k, because theirs counts assignments and ours shares.

    Raises:
        ValueError: the architecture is not known, or has what ours has not.
    """
    name = type(model).__name__
    if isinstance(model, (S2MoEForCausalLM, SparseModelMixin)):
        raise ValueError(f"{name} has our SMoE layers already")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantised: load it in bfloat16 or float32")
    if name in ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"):
        return _native_from(model)
    family = family_of(model)
    if not family.moe_block:
        raise ValueError(f"{name} is dense: s2moe.upcycle gives it SMoE layers")
    config = _carried(model.config, CONFIGS[family.name], moe=_moe_of(model.config))
    state = {
        ours: tensor
        for key, value in model.state_dict().items()
        for ours, tensor in _split(key, value, ".mlp.", ".mlp.moe.").items()
    }
    return _load(MODELS[family.name], config, state, model)


@torch.no_grad()
def to_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """A model of transformers' own code, that computes what this one does in evaluation.

    Raises:
        ValueError: no architecture of transformers can express the model; says what stands against it.
    """
    if isinstance(model, S2MoEForCausalLM):
        return _native_to(model)
    if not isinstance(model, SparseModelMixin):
        raise ValueError(f"{type(model).__name__} has none of our SMoE layers")
    if not isinstance(model, MODELS[model.family.name]):
        raise ValueError(f"{type(model).__name__} is no causal language model, which is what goes out")
    family, moe = model.family, model.config.moe_config()
    renormalised = _rule(moe)
    sparse = [family.is_sparse(block, layer, moe) for layer, block in enumerate(family.blocks(model))]
    if family.moe_block:
        target = family.model_name.removesuffix("ForCausalLM")
        changes: dict[str, Any] = {}
        sparse = [block.mlp.__class__.__name__ == "SparseMLP" for block in family.blocks(model)]
    else:
        if family.name not in SPARSE_OF_DENSE:
            raise ValueError(f"transformers has no mixture of experts with the blocks of {family.model_name}")
        target = SPARSE_OF_DENSE[family.name]
        changes = _sizes(target, moe, sparse)
        if getattr(model.config, "attention_bias", False) and target == "Mixtral":
            raise ValueError("attention_bias=true: Mixtral's attention has no biases")
        if getattr(model.config, "use_sliding_window", False):
            raise ValueError("use_sliding_window=true: not tried for a mixture of this architecture")
        _check_target(target, moe, renormalised, sparse)
    if moe.shared_experts:
        raise ValueError("shared experts of our own: only S2MoEForCausalLM goes out with them, as Qwen2-MoE")
    changes |= {"norm_topk_prob": renormalised, "hidden_act": THEIR_ACTIVATIONS[moe.activation]}
    changes["num_experts_per_tok"] = moe.experts_per_token
    config = _carried(model.config, getattr(transformers, f"{target}Config"), **changes)
    state = _joined(model.state_dict(), ".mlp.moe.")
    if target == "Qwen2Moe" and not family.moe_block:
        state |= _no_shared_expert(model, sparse)
    return _load(getattr(transformers, f"{target}ForCausalLM"), config, state, model)


def _native_from(model: PreTrainedModel) -> S2MoEForCausalLM:
    theirs = model.config
    for name in ("attention_bias", "mlp_bias"):
        if getattr(theirs, name, False):
            raise ValueError(f"{name}=true: S2MoEForCausalLM has no such biases")
    if getattr(theirs, "sliding_window", None) is not None:
        raise ValueError(
            f"sliding_window={theirs.sliding_window}: S2MoEForCausalLM attends to the whole context. If no text will "
            "be longer than the window, set model.config.sliding_window=None first; s2moe.upcycle keeps the window"
        )
    dense = not hasattr(theirs, "num_local_experts")
    moe = {"first_dense": theirs.num_hidden_layers, "method": "smoe"} if dense else _moe_of(theirs)
    moe |= {"expert_form": "gated", "activation": _activation(theirs)}
    eos = theirs.eos_token_id  # a list of them stays in the generation configuration
    config = _carried(theirs, S2MoEConfig, moe=moe, eos_token_id=eos if isinstance(eos, int) else None)
    state = {
        _renamed(ours, to_ours=True): tensor
        for key, value in model.state_dict().items()
        for ours, tensor in _split(key, value, ".mlp.", ".moe.").items()
    }
    return _load(S2MoEForCausalLM, config, state, model)


def _native_to(model: S2MoEForCausalLM) -> PreTrainedModel:
    ours, moe = model.config, model.config.moe_config()
    sparse = [moe.is_sparse(layer) for layer in range(ours.num_hidden_layers)]
    if moe.expert_form != "gated":
        raise ValueError("expert_form=mlp: transformers' mixtures have gated experts")
    common = {"hidden_act": THEIR_ACTIVATIONS[moe.activation]}
    if not any(sparse):
        target, changes = "Llama", common
    else:
        renormalised = _rule(moe)
        target = "Mixtral" if renormalised and all(sparse) and not moe.shared_experts else "Qwen2Moe"
        changes = common | _sizes(target, moe, sparse) | {"norm_topk_prob": renormalised, "qkv_bias": False}
    config = _carried(ours, getattr(transformers, f"{target}Config"), **changes)
    renamed = {_renamed(key, to_ours=False): value for key, value in model.state_dict().items()}
    state = _joined(renamed, ".moe.")
    if target == "Qwen2Moe":
        state |= _no_shared_expert(model, sparse) if not moe.shared_experts else _open_gate(model, sparse)
        for key in state:
            if key.endswith(".shared_expert.down_proj.weight"):
                state[key] = state[key] * 2
    return _load(getattr(transformers, f"{target}ForCausalLM"), config, state, model)


def _rule(moe: MoEConfig) -> bool:
    """Whether weights are renormalised; ValueError unless evaluation is plain top-k."""
    router = moe.router
    problems = {
        f"router.name={router['name']}": router["name"] != "topk",
        f"router.combine={router.get('combine')}": router.get("combine") == "sigmoid",
        f"router.scale={router.get('scale')}": router.get("scale", 1.0) != 1.0,
        "router.bias_update_rate: the choice has a bias": bool(router.get("bias_update_rate")),
        "stochastic.inference=gated": moe.stochastic.enabled and moe.stochastic.inference == "gated",
        f"momentum.kind={moe.momentum.kind}": moe.momentum.kind != "none",
        "momentum.sign=subtract": moe.momentum.sign != "add",
        "momentum.legacy_double_residual": moe.momentum.legacy_double_residual,
        "expert_form=mlp": moe.expert_form != "gated",
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ValueError(f"transformers' mixtures of experts cannot express {'; '.join(found)}")
    return router["renormalise"] or router["combine"] in ("topk_then_softmax", "straight_through")


def _check_target(target: str, moe: MoEConfig, renormalised: bool, sparse: list[bool]) -> None:
    if target == "Mixtral" and not (renormalised and all(sparse)):
        raise ValueError(
            "Mixtral has SMoE layers throughout and renormalised weights, this model "
            + ("has dense layers" if renormalised else f"has router.combine={moe.router['combine']}")
        )


def _sizes(target: str, moe: MoEConfig, sparse: list[bool]) -> dict[str, Any]:
    """How the target's configuration says what ``moe`` does."""
    common = {"num_experts_per_tok": moe.experts_per_token}
    if target == "Mixtral":
        return common | {"num_local_experts": moe.num_experts, "intermediate_size": moe.expert_hidden}
    sizes = common | {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_sparse in enumerate(sparse) if not is_sparse],
    }
    if target == "Qwen2Moe":
        # A width of 1 where there is none: not every reader of the format takes an empty matrix.
        sizes["shared_expert_intermediate_size"] = max(1, moe.shared_experts * moe.expert_hidden)
    return sizes


def _moe_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Our options of a mixture of transformers."""
    k = config.num_experts_per_tok
    renormalised = getattr(config, "norm_topk_prob", True)
    router: dict[str, Any] = {"name": "topk", "balance_loss": config.router_aux_loss_coef * k}
    if renormalised and k == 1:
        router["combine"] = "straight_through"
    else:
        router["renormalise"] = renormalised
    if getattr(config, "router_jitter_noise", 0.0):
        router |= {"noise": "jitter", "jitter": config.router_jitter_noise}
    return {
        "method": "smoe",
        "num_experts": config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts,
        "experts_per_token": k,
        "expert_hidden": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "expert_form": "gated",
        "activation": _activation(config),
        "router": router,
    }


def _activation(config: PreTrainedConfig) -> str:
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"the activation {config.hidden_act!r} is not among ours: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config.hidden_act]


def _carried(config: PreTrainedConfig, target: type[Any], **changes: Any) -> Any:
    """A configuration of another class, with what both know and ``changes`` that it knows."""
    general = {field.name for field in fields(PreTrainedConfig)}
    known = ({field.name for field in fields(target)} | {"head_dim"}) - general
    given = {name: copy.deepcopy(getattr(config, name)) for name in known if getattr(config, name, None) is not None}
    given |= {name: value for name, value in changes.items() if name in known}
    return target(**{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **given})


def _split(key: str, value: Tensor, theirs: str, ours: str) -> State:
    """Our tensors of one of theirs."""
    if key.endswith(f"{theirs}gate.weight"):
        return {key.replace(f"{theirs}gate.weight", f"{ours}router.scores.weight"): value}
    if key.endswith(f"{theirs}experts.gate_up_proj"):
        gate, up = value.chunk(2, dim=1)
        stem = key.removesuffix(f"{theirs}experts.gate_up_proj") + f"{ours}experts."
        return {f"{stem}w1": gate.contiguous(), f"{stem}w3": up.contiguous()}
    if key.endswith(f"{theirs}experts.down_proj"):
        return {key.replace(f"{theirs}experts.down_proj", f"{ours}experts.w2"): value}
    return {key: value}


def _joined(state: State, ours: str) -> State:
    """Their tensors of ours: the experts' first matrices in one. What serves training alone is left out."""
    joined: State = {}
    for key, value in state.items():
        stem, found, name = key.partition(ours)
        if not found:
            joined[key] = value
        elif name == "router.scores.weight":
            joined[f"{stem}.mlp.gate.weight"] = value
        elif name == "experts.w1":
            joined[f"{stem}.mlp.experts.gate_up_proj"] = torch.cat((value, state[f"{stem}{ours}experts.w3"]), dim=1)
        elif name == "experts.w2":
            joined[f"{stem}.mlp.experts.down_proj"] = value
    return joined


def _renamed(key: str, to_ours: bool) -> str:
    for ours, llama in OURS_AND_LLAMA:
        key = key.replace(llama, ours) if to_ours else key.replace(ours, llama)
    return key


def _no_shared_expert(model: PreTrainedModel, sparse: list[bool]) -> State:
    """Qwen2-MoE's shared expert and its gate, with an output of zero."""
    width = model.config.hidden_size
    like = next(model.parameters())
    state: State = {}
    for layer, is_sparse in enumerate(sparse):
        if is_sparse:
            stem = f"model.layers.{layer}.mlp.shared_expert"
            state[f"{stem}.gate_proj.weight"] = like.new_zeros(1, width)
            state[f"{stem}.up_proj.weight"] = like.new_zeros(1, width)
            state[f"{stem}.down_proj.weight"] = like.new_zeros(width, 1)
            state[f"{stem}_gate.weight"] = like.new_zeros(1, width)
    return state


def _open_gate(model: PreTrainedModel, sparse: list[bool]) -> State:
    """A gate that is 1/2 for every token."""
    like = next(model.parameters())
    return {
        f"model.layers.{layer}.mlp.shared_expert_gate.weight": like.new_zeros(1, model.config.hidden_size)
        for layer, is_sparse in enumerate(sparse)
        if is_sparse
    }


def _load(cls: Any, config: Any, state: State, source: PreTrainedModel) -> PreTrainedModel:
    """The model with exactly these weights."""
    with undrawn_experts():
        built = cls._from_config(config, dtype=source.dtype)
    built.set_attn_implementation(source.config._attn_implementation)
    missing, unexpected = built.load_state_dict(state, strict=False)
    tied = set(built.all_tied_weights_keys)
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise ValueError(f"weights of {type(source).__name__} and {cls.__name__} differ: {[*missing, *unexpected]}")
    built.tie_weights()
    built.generation_config = copy.deepcopy(source.generation_config)
    built = built.double() if source.dtype == torch.float64 else built  # buffers too
    return built.to(source.device).train(source.training)
