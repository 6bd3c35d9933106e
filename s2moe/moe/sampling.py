"""A few tokens of a micro-batch, for objectives that compare all pairs.

Legend: T tokens, M sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.moe.routing import RoutingContext


@torch.no_grad()
def sample_tokens(
    context: RoutingContext, tokens: int, samples: int, device: torch.device, purpose: str
) -> tuple[Tensor, Tensor | None]:
    """Numbers of at most ``samples`` tokens, without replacement, and which of them are not padding (None: all)."""
    key_T = torch.rand(tokens, generator=context.generator(device, purpose), device=device)
    if context.mask_T is not None:
        key_T = key_T.masked_fill(~context.mask_T, -1.0)  # padding is drawn last
    key_M, index_M = key_T.topk(min(samples, tokens))
    return index_M, None if context.mask_T is None else key_M >= 0
