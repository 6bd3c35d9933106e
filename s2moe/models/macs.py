"""Multiply-accumulates of one token in inference, by each way of counting them that the literature has.

A share that is saved ("28 % fewer FLOPs") depends on what is counted as the whole. For the size at which the
S2MoE lineage works, one expert fewer saves 20 % of a layer, 25 % of its linear maps, 29 % of query, key, value and
experts.
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


def inference_macs(config: S2MoEConfig, experts_per_token: float, positions: float) -> dict[str, float]:
    """Multiply-accumulates of one token's clean forward pass, by convention.

    Args:
        experts_per_token: of each SMoE layer, on average where routing decides how many.
        positions: that a token attends to, itself included, on average.
    """
    moe, width, layers = config.moe_config(), config.hidden_size, config.num_hidden_layers
    sizes = model_sizes(config, experts_per_token)
    sparse = sum(moe.is_sparse(layer) for layer in range(layers))
    heads = config.attention_shape()
    linear = sizes.macs_per_token - config.vocab_size * width
    output_projection = layers * width * heads.query_heads * heads.width
    routers = sparse * meta_router(moe, width).macs_per_token()
    layer_macs = linear + sizes.attention_macs_per_position * positions
    return {
        "model": layer_macs + config.vocab_size * width,
        "layers": layer_macs,
        "linear": float(linear),
        "qkv_experts": float(linear - output_projection - routers),
    }


def mean_positions(length: int) -> float:
    """Positions that a token of a sequence attends to on average, causally."""
    return (length + 1) / 2
