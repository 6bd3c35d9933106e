"""What a router remembers of earlier positions, and which of them a token may look at.

Routers that mix information over positions (token graphs, distilled routers on n-grams of tokens)
need the past in cached decoding, as attention does. They keep it in the same cache, as further
layers behind those of attention, so beam search, cropping and batching treat both alike.

Legend: B sequences, S new positions, L all positions so far (the new ones last), X, Y any widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class History:
    """One router's place in a transformers ``Cache``."""

    cache: Any
    slot: int  # number of the cache's layer

    def extend(self, first_BSX: Tensor, second_BSY: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions' rows to those before, and return all: [B, L, X], [B, L, Y].

        To be called once in a forward pass.
        """
        from transformers.cache_utils import DynamicLayer

        layers = self.cache.layers
        while len(layers) <= self.slot:
            layers.append(DynamicLayer())
        first, second = layers[self.slot].update(first_BSX[:, None], second_BSY[:, None])
        return first[:, 0], second[:, 0]


def extend(history: History | None, first_BSX: Tensor, second_BSY: Tensor) -> tuple[Tensor, Tensor]:
    """``history.extend``; without a history the new positions are all there are."""
    return (first_BSX, second_BSY) if history is None else history.extend(first_BSX, second_BSY)


def visible(
    attention_mask: Tensor | None, queries: slice, keys: int, total_queries: int, device: torch.device
) -> Tensor:
    """Which of ``keys`` positions each of the new positions ``queries`` may look at, bool [B or 1, S, L].

    Its own and earlier ones that are not padding; a row of padding sees itself alone.

    Args:
        attention_mask: as the model was given it. [B, L]: False or 0 for padding; [B or 1, 1, S, L]: True or 0.0
            where a position may look; None: no padding.
        queries: a chunk of the new positions, by number from 0, with start and stop.
        keys: L. The new positions are the last ``total_queries`` of them.
    """
    position_S = torch.arange(queries.start, queries.stop, device=device) + (keys - total_queries)
    key_L = torch.arange(keys, device=device)
    own_SL = position_S[:, None] == key_L
    seen_BSL = (key_L <= position_S[:, None])[None]
    if attention_mask is not None and attention_mask.dim() == 4:
        given_BSL = attention_mask[:, 0, queries, :keys]
        seen_BSL = seen_BSL & (given_BSL if given_BSL.dtype == torch.bool else given_BSL == 0)
    elif attention_mask is not None:
        seen_BSL = seen_BSL & attention_mask[:, None, :keys].bool()
    return seen_BSL | own_SL
