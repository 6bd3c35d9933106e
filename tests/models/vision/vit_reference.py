"""A vision Transformer in evaluation, written from the equations, one image and one token at a time.

Nothing here calls the code under test but to read its parameters.

Legend: S tokens of an image, D model, H heads, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.moe import reference


def layer_norm(x_D: Tensor, norm: Any) -> Tensor:
    mean = x_D.mean()
    deviation = (((x_D - mean) ** 2).mean() + norm.eps) ** 0.5
    return (x_D - mean) / deviation * norm.weight + norm.bias


def product(x_D: Tensor, linear: Any) -> Tensor:
    return linear.weight @ x_D + linear.bias


def tokens(image: Tensor, embedding: Any, patch: int) -> list[Tensor]:
    """Class token, then patches row by row, each with its position."""
    rows = [embedding.class_token[0, 0]]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            pixels = image[:, top : top + patch, left : left + patch]
            rows.append((embedding.patch.weight * pixels).sum((1, 2, 3)) + embedding.patch.bias)
    return [row + position for row, position in zip(rows, embedding.positions[0], strict=True)]


def attention(rows: list[Tensor], block: Any, heads: int) -> list[Tensor]:
    query, key, value = (
        [product(x, projection).view(heads, -1) for x in rows]
        for projection in (block.q_proj, block.k_proj, block.v_proj)
    )
    out = []
    for q in query:
        mixed = []
        for h in range(heads):
            score = torch.stack([q[h] @ k[h] for k in key]) / len(q[h]) ** 0.5
            prob = reference.normalise_exp(score)
            mixed.append(sum(p * v[h] for p, v in zip(prob, value, strict=True)))
        out.append(product(torch.cat(mixed), block.o_proj))
    return out


def mixture(rows: list[Tensor], layer: Any, k: int) -> list[Tensor]:
    """Σ over a token's k experts of softmax(W x)_i · expert_i(x), not renormalised."""
    out, experts = [], layer.experts
    for x in rows:
        gate = reference.normalise_exp(layer.router.scores.weight @ x)
        out.append(
            sum(
                gate[e] * reference.expert_mlp(x, experts.w1[e], experts.w2[e], experts.w3[e], "mlp_biases", "gelu")
                for e in reference.best(gate, k)
            )
        )
    return out


def logits(model: Any, images: Tensor, sparse: set[int], k: int) -> Tensor:
    """[B, C] of a dropless model whose blocks ``sparse`` have experts."""
    sizes = model.config.sizes()
    result = []
    for image in images:
        rows = tokens(image, model.embedding, sizes.patch_size)
        for number, block in enumerate(model.blocks):
            attended = attention(
                [layer_norm(x, block.attention_norm) for x in rows], block.attention, block.attention.heads
            )
            rows = [x + a for x, a in zip(rows, attended, strict=True)]
            normed = [layer_norm(x, block.mlp_norm) for x in rows]
            if number in sparse:
                mixed = mixture(normed, block.moe, k)
            else:
                mixed = [product(reference.activate(product(x, block.mlp.up), "gelu"), block.mlp.down) for x in normed]
            rows = [x + m for x, m in zip(rows, mixed, strict=True)]
        state = layer_norm(rows[0], model.norm)
        if model.representation is not None:
            state = torch.tanh(product(state, model.representation))
        result.append(product(state, model.head))
    return torch.stack(result)
