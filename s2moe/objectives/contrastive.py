"""InfoNCE (van den Oord et al. 2018) between two views of the same rows.

Legend: M sampled rows, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2moe.precision import full_precision, linear


class Contrast(NamedTuple):
    """``loss`` in nats; ``accuracy``: how often a row's own other view is the most similar one."""

    loss: Tensor
    accuracy: Tensor


def info_nce(
    first_MD: Tensor,
    second_MD: Tensor,
    temperature: float = 0.1,
    valid_M: Tensor | None = None,
    symmetric: bool = False,
) -> Contrast:
    """Cross-entropy of picking row i of ``second`` for row i of ``first`` among all rows, by cosine / τ.

    Args:
        valid_M: rows that count; the others are neither anchors nor negatives.
        symmetric: average with the loss in the other direction.
    """
    first_MD = F.normalize(full_precision(first_MD), dim=-1)
    second_MD = F.normalize(full_precision(second_MD), dim=-1)
    logits_MM = linear(first_MD, second_MD) / temperature
    target_M = torch.arange(len(logits_MM), device=logits_MM.device)
    if valid_M is not None:
        logits_MM = logits_MM.masked_fill(~valid_M, torch.finfo(logits_MM.dtype).min)
        target_M = torch.where(valid_M, target_M, -100)
    loss = _cross_entropy(logits_MM, target_M)
    if symmetric:
        other_MM = logits_MM.T
        if valid_M is not None:
            other_MM = other_MM.masked_fill(~valid_M, torch.finfo(other_MM.dtype).min)
        loss = (loss + _cross_entropy(other_MM, target_M)) / 2
    hit_M = logits_MM.detach().argmax(-1) == target_M
    counted = (target_M >= 0).sum().clamp(min=1)
    return Contrast(loss, hit_M.sum() / counted)


def _cross_entropy(logits_MM: Tensor, target_M: Tensor) -> Tensor:
    counted = (target_M >= 0).sum().clamp(min=1)  # all rows invalid: 0, not NaN
    return F.cross_entropy(logits_MM, target_M, reduction="sum") / counted
