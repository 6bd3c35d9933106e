"""Dense models made sparse: SMoE layers in place of MLPs, experts made of the dense weights.

Komatsuzaki et al. 2023, "Sparse Upcycling"; He et al. 2024, "Upcycling Large Language Models into Mixture of
Experts", for fine-grained experts. In evaluation the new model computes what the dense one did:

copies   Every expert is the dense MLP f, so Σ w_e f(x) = c f(x) where a token's weights sum to c. What the sum is,
         is measured; it must be the same for every token. The experts' last matrix is divided by it.
slices   The hidden units of the MLP are dealt out to S experts, f = Σ_s f_s, and every S experts in a row form a
         group that is the whole MLP. A group's rows of the router are equal at first, so a token goes to whole
         groups (k is a multiple of S), with weight c / k for each expert. The last matrix takes the factor S / c.
shared   Shared experts, which every token sees besides its own, begin with an output of zero.

Copies and groups differ from the first step on, because the router sends them different tokens, or weighs them
differently. ``noise`` makes them differ from the start, at the price of exactness.

What cannot be exact is refused: routers whose weights do not sum to the same for all tokens (each layer is tried
on random hidden states), and momentum, which changes the residual stream between layers. Noise, jitter and
capacity work in training alone.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2moe.hub.block import SparseMLP
from s2moe.hub.families import ACTIVATIONS, DenseWeights, Family, family_of
from s2moe.hub.sparse_models import CONFIGS, MODELS, SparseModelMixin, moves_between_layers, undrawn_experts
from s2moe.models import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.config import MoEConfig, resolve_moe
from s2moe.moe.layer import DenseMLP, SMoELayer
from s2moe.moe.routers import LinearScores
from s2moe.moe.routing import RoutingContext
from s2moe.options import deep_merge

ARGUMENTS = {  # of upcycle, by the layers' options that they decide
    "method": "method",
    "num_experts": "experts",
    "experts_per_token": "experts_per_token",
    "every": "every",
    "first_dense": "first_dense",
}
OF_THE_DENSE_MODEL = ("expert_hidden", "expert_form", "activation")
TRIED_TOKENS = 32  # hidden states on which each layer is tried
SAME_SUM = 1e-4  # how far a token's weights may sum to something else than another's
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative error


@torch.no_grad()
def upcycle(
    model: PreTrainedModel,
    method: str = "smoe",
    experts: int = 8,
    experts_per_token: int | None = None,
    every: int = 1,
    first_dense: int = 0,
    slices: int = 1,
    noise: float = 0.0,
    moe: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A new model with SMoE layers in place of the dense model's MLPs, which computes the same in evaluation.

    The dense model stays as it is; the new one copies its weights, and is in training mode if that was.

    Args:
        model: a causal language model of the Llama, Mistral, Qwen2, Qwen3 or GPT-2 architecture, or a dense
            S2MoEForCausalLM (``moe.first_dense`` = its number of layers).
        method: the routing method, as ``model.moe.method`` of a run's configuration.
        experts: of each layer; with ``slices`` a multiple of them.
        experts_per_token: k; None: the method's own number, times ``slices``.
        every, first_dense: which layers become sparse, as in a run's configuration.
        slices: parts into which the MLP is cut; 1: experts are copies.
        noise: standard deviation of what is added to the experts' matrices, relative to each matrix's own. The
            function changes by about as much; 0 leaves it exact.
        moe: other options of the layers, as in a run's configuration, e.g. {"router": {"balance_loss": 0.02}}. Where
            they leave the rule of weights open, it is set so that weights sum to 1: renormalised, or
            straight_through for k = 1.

    Returns:
        A transformers model to be trained, saved and loaded as usual (with ``import s2moe``).

    Raises:
        ValueError: the architecture is not known, an option impossible, or the function would not be the same.
    """
    native = isinstance(model, S2MoEForCausalLM)
    family = None if native else family_of(model)
    if isinstance(model, SparseModelMixin) or (family is not None and family.moe_block):
        raise ValueError(f"{type(model).__name__} is a mixture of experts already: from_transformers reads such models")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantised: load it in bfloat16 or float32")
    dense: dict[int, Any] = dict(enumerate(_dense_mlps(model, family)))
    width, form, activation = _shape(model, family)
    if slices < 1 or width % slices:
        raise ValueError(f"slices must divide the MLP's hidden width {width}, got {slices}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a number, not negative, got {noise}")
    for name in moe or {}:
        if name in ARGUMENTS:
            raise ValueError(f"moe holds {name!r}, which is the argument {ARGUMENTS[name]}")
        if name in OF_THE_DENSE_MODEL:
            raise ValueError(f"moe holds {name!r}, which follows from the dense model, whose MLPs become the experts")
    given = {
        **(moe or {}),
        "method": method,
        "num_experts": experts,
        "expert_hidden": width // slices,
        "expert_form": form,
        "activation": activation,
        "every": every,
        "first_dense": first_dense,
    }
    config = _resolve(given, experts_per_token, slices)
    if experts % slices or config.experts_per_token % slices:
        raise ValueError(
            f"experts ({experts}) and experts_per_token ({config.experts_per_token}) must be multiples of slices "
            f"({slices}): only whole groups of slices are the dense MLP"
        )
    if native and moves_between_layers(config):
        raise ValueError("momentum changes the residual stream between blocks: set momentum.kind=none")

    sparse = _build(model, family, config)
    layers = _smoe_layers(sparse)
    for number, layer in layers.items():
        block: nn.Module = layer if native else _block_of(sparse, layer)
        mlp = dense[number]
        weights = _native_weights(mlp) if native else family.weights(mlp)  # type: ignore[union-attr]
        _fill(layer, block, weights, slices)
        if slices > 1:
            _tie_groups(layer, slices)
        factor = slices / _weight_sum(layer, model.dtype)
        layer.experts.w2.mul_(factor)
        _check_same(mlp, block, layer, method)
        if noise:
            _disturb(layer, noise)
    return sparse.train(model.training)


def _resolve(given: dict[str, Any], experts_per_token: int | None, slices: int) -> MoEConfig:
    """The layers' options, with a rule of weights that sum to 1 where the user leaves it open."""
    if experts_per_token is None:
        experts_per_token = min(resolve_moe(given).experts_per_token * slices, given["num_experts"])
    given = {**given, "experts_per_token": experts_per_token}
    chosen = given.get("router") or {}
    if not {"combine", "renormalise"} & set(chosen):
        router = resolve_moe(given).router
        rule: dict[str, Any] = {}
        if experts_per_token == 1 and "combine" in router:
            rule = {"combine": "straight_through", "renormalise": False}
        elif router.get("combine", "gate") in ("softmax_then_topk", "sigmoid", "gate") and "renormalise" in router:
            rule = {"renormalise": True}
        given = deep_merge(given, {"router": rule})
    return resolve_moe(given)


def _dense_mlps(model: Any, family: Family | None) -> list[Any]:
    if family is not None:
        return [block.mlp for block in family.blocks(model)]
    blocks = list(model.model.layers)
    if any(block.is_sparse for block in blocks):
        raise ValueError("the S2MoEForCausalLM has SMoE layers already: a dense one has moe.first_dense=its layers")
    return [block.mlp for block in blocks]


def _shape(model: Any, family: Family | None) -> tuple[int, str, str]:
    """Hidden width, form and activation of the dense MLPs."""
    config = model.config
    if family is None:
        moe = config.moe_config()
        return config.intermediate_size, moe.expert_form, moe.activation
    weights = family.weights(family.blocks(model)[0].mlp)
    name = getattr(config, "hidden_act", None) or config.activation_function
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not among the experts': {', '.join(ACTIVATIONS)}")
    return weights.w1.shape[0], family.form, ACTIVATIONS[name]


def _native_weights(mlp: DenseMLP) -> DenseWeights:
    if mlp.gate is not None:
        return DenseWeights(mlp.gate.weight, mlp.down.weight, mlp.up.weight)
    return DenseWeights(mlp.up.weight, mlp.down.weight, mlp.up.bias[None])


def _build(model: PreTrainedModel, family: Family | None, config: MoEConfig) -> PreTrainedModel:
    """The new model with the dense one's weights wherever both have them; experts are filled in afterwards."""
    values = copy.deepcopy(model.config).to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path", "moe"):
        values.pop(name, None)
    new = (S2MoEConfig if family is None else CONFIGS[family.name])(**values, moe=asdict(config))
    cls = S2MoEForCausalLM if family is None else MODELS[family.name]
    with undrawn_experts():
        built = cls._from_config(new, dtype=model.dtype)
    built.set_attn_implementation(model.config._attn_implementation)
    missing, _ = built.load_state_dict(model.state_dict(), strict=False)
    strange = [name for name in missing if ".moe." not in name and not name.endswith(".mlp.bias")]
    if strange:
        raise ValueError(f"the dense model has no weights {strange}")
    built.tie_weights()
    built.generation_config = copy.deepcopy(model.generation_config)
    return (built.double() if model.dtype == torch.float64 else built).to(model.device)  # buffers too


def _smoe_layers(model: nn.Module) -> dict[int, SMoELayer]:
    return {module.layer: module for module in model.modules() if isinstance(module, SMoELayer)}


def _block_of(model: nn.Module, layer: SMoELayer) -> SparseMLP:
    return next(block for block in model.modules() if isinstance(block, SparseMLP) and block.moe is layer)


def _fill(layer: SMoELayer, block: nn.Module, weights: DenseWeights, slices: int) -> None:
    """Expert e is slice e mod ``slices``: rows of w1 and w3 (of the hidden bias, its part), columns of w2."""
    experts = layer.experts
    for expert in range(layer.num_experts):
        part = expert % slices
        experts.w1[expert].copy_(weights.w1.chunk(slices, 0)[part])
        experts.w2[expert].copy_(weights.w2.chunk(slices, 1)[part])
        experts.w3[expert].copy_(weights.w3.chunk(slices, 1 if experts.form == "mlp" else 0)[part])
    if weights.bias is not None:
        assert isinstance(block, SparseMLP)
        assert block.bias is not None
        block.bias.copy_(weights.bias)
    if layer.shared is not None:
        layer.shared.down.weight.zero_()


def _tie_groups(layer: SMoELayer, slices: int) -> None:
    """Let every expert of a group be chosen alike."""
    scores = getattr(layer.router, "scores", None)
    if not isinstance(scores, LinearScores):
        raise ValueError(
            f"slices need a router with one row of a matrix for each expert, which {layer.config.router['name']!r} "
            "has not: use slices=1, or another method"
        )
    if not scores.weight.any():
        raise ValueError(
            "a router that starts at zero does not tell groups of slices apart: set router.zero_init=false"
        )
    first_E = torch.arange(layer.num_experts, device=scores.weight.device) // slices * slices
    scores.weight.copy_(scores.weight[first_E])


def _tried_states(layer: SMoELayer, dtype: torch.dtype) -> Tensor:
    weight = layer.experts.w1
    generator = torch.Generator().manual_seed(layer.layer)
    states = torch.randn(1, TRIED_TOKENS, weight.shape[-1], generator=generator)
    return states.to(weight.device, dtype)


def _weight_sum(layer: SMoELayer, dtype: torch.dtype) -> float:
    """What a token's weights sum to; ValueError unless it is the same for all."""
    was_training, tried = layer.training, _tried_states(layer, dtype)[0]
    layer.eval()
    routing = layer.router(tried, RoutingContext(layer=layer.layer))
    layer.train(was_training)
    sum_T = routing.weight_N.new_zeros(len(tried)).index_add(0, routing.token_N, routing.weight_N)
    low, high = sum_T.min().item(), sum_T.max().item()
    if not 0 < high <= low * (1 + SAME_SUM):
        raise ValueError(
            f"with method {layer.config.method!r} and k={layer.config.experts_per_token} the weights of a token sum to "
            f"{low:.4g} for one and {high:.4g} for another, so copies of the dense MLP do not add up to it: choose a "
            "router whose weights always sum to the same, e.g. method=smoe (topk with renormalise=true, or with "
            "combine=straight_through for k=1)"
        )
    return high


def _check_same(mlp: nn.Module, block: nn.Module, layer: SMoELayer, method: str) -> None:
    """Raise ValueError unless the SMoE layer computes what the dense MLP does."""
    tried = _tried_states(layer, layer.experts.w1.dtype)
    was_training = mlp.training
    mlp.eval()
    block.eval()
    wanted, got = mlp(tried), block(tried)
    mlp.train(was_training)
    got = got[0] if isinstance(got, tuple) else got
    if isinstance(block, SparseMLP):
        block.statistics = None
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= CLOSE[wanted.dtype]:
        raise ValueError(
            f"layer {layer.layer} with method {method!r} would not compute what the dense MLP does (relative error "
            f"{error:.2g}): choose a method whose inference is a plain mixture, e.g. method=smoe"
        )


def _disturb(layer: SMoELayer, noise: float) -> None:
    experts = layer.experts
    for matrix in (experts.w1, experts.w2, *((experts.w3,) if experts.form == "gated" else ())):
        matrix.add_(torch.randn_like(matrix) * (noise * matrix.float().std().item()))
