"""Multiply-accumulates of one token in inference, by each way of counting them that the literature has.

A share that is saved ("28 % fewer FLOPs") depends on what is counted as the whole. For the size at which the
S2MoE lineage works, one expert fewer saves 20 % of a layer, 25 % of its linear maps, 29 % of query, key, value and
experts, and 10 % of a layer where a Transformer-XL attends to a memory.
"""

from __future__ import annotations

from s2moe.models.configuration import S2MoEConfig, meta_router
from s2moe.models.sizes import model_sizes

CONVENTIONS = {
    "model": "all matrix products: projections, attention's scores and values, experts, dense MLPs, routers, output",
    "layers": "the same without the output matrix",
    "linear": "linear maps of the layers: projections, experts, dense MLPs, routers",
    "qkv_experts": "query, key and value projections, experts and dense MLPs",
}
TRANSFORMER_XL = "transformer_xl"


def conventions(memory: int | None = None) -> dict[str, str]:
    """The ways of counting, by name: those above and, given the positions of a memory, Transformer-XL's."""
    if memory is None:
        return CONVENTIONS
    return CONVENTIONS | {
        TRANSFORMER_XL: f"layers, whose attention scores by content and by relative position, over {memory:,} "
        "positions of memory and the whole sequence, masked ones included, as a Transformer-XL computes it"
    }


def inference_macs(
    config: S2MoEConfig, experts_per_token: float, positions: float, whole: int | None = None
) -> dict[str, float]:
    """Multiply-accumulates of one token's clean forward pass, by convention.

    Args:
        experts_per_token: of each SMoE layer, on average where routing decides how many.
        positions: that a token attends to, itself included, on average.
        whole: positions of a Transformer-XL's memory and sequence together; None: that way of counting is left out.
    """
    moe, width, layers = config.moe_config(), config.hidden_size, config.num_hidden_layers
    sizes = model_sizes(config, experts_per_token)
    sparse = sum(moe.is_sparse(layer) for layer in range(layers))
    heads = config.attention_shape()
    linear = sizes.macs_per_token - config.vocab_size * width
    output_projection = layers * width * heads.query_heads * heads.width
    routers = sparse * meta_router(moe, width).macs_per_token()
    layer_macs = linear + sizes.attention_macs_per_position * positions
    three_products = 1.5 * sizes.attention_macs_per_position  # with queries times relative positions
    macs = {
        "model": layer_macs + config.vocab_size * width,
        "layers": layer_macs,
        "linear": float(linear),
        "qkv_experts": float(linear - output_projection - routers),
    }
    return macs if whole is None else macs | {TRANSFORMER_XL: linear + three_products * whole}


def mean_positions(length: int) -> float:
    """Positions that a token of a sequence attends to on average, causally."""
    return (length + 1) / 2
