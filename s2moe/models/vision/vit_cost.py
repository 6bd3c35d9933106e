"""FLOPs of a vision Transformer's inference, counted from its configuration. One multiply-accumulate is two FLOPs.

Counted are the matrix products: patches, projections, attention, MLPs, routers, experts, head.
"""

from __future__ import annotations

from s2moe.models.configuration import meta_router
from s2moe.models.vision.vit_config import VMoEConfig


def image_flops(config: VMoEConfig, assignments: float | None = None) -> float:
    """Of one image.

    Args:
        assignments: (token, expert) pairs of an image that each SMoE layer computes, on average: fewer than k a token
            where capacity drops some. None: all of the trained k.
    """
    sizes, moe, tokens = config.sizes(), config.moe_config(), config.patches + 1
    width, layers = sizes.hidden_size, sizes.num_hidden_layers
    sparse = sum(moe.is_sparse(layer) for layer in range(layers))
    router = meta_router(moe, width)
    if assignments is None:
        assignments = tokens * router.mean_choices(training=False)
    matrices = 3 if moe.expert_form == "gated" else 2
    expert = matrices * width * moe.expert_hidden
    patches = config.patches * sizes.patch_size**2 * config.num_channels * width
    attention = layers * (4 * tokens * width**2 + 2 * tokens**2 * width)
    dense = (layers - sparse) * tokens * 2 * width * sizes.intermediate_size
    mixture = sparse * (tokens * (router.macs_per_token() + moe.shared_experts * expert) + assignments * expert)
    representation = config.representation_size or 0
    head = width * representation + (representation or width) * config.num_classes
    return 2.0 * (patches + attention + dense + mixture + head)
