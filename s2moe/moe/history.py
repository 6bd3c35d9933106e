"""What a router remembers of earlier positions, and which of them a token may look at.

Routers that mix information over positions (token graphs, distilled routers on n-grams of tokens)
need the past in cached decoding, as attention does. They keep it in the same cache, as further
layers behind those of attention, so beam search, cropping and batching treat both alike.

Legend: B sequences, S new positions, L all positions so far (the new ones last), X, Y any widths,
W positions looked back on, the own one included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
            # The masks that transformers makes for a cache of fixed size rely on all its layers saying so.
            layers[-1].is_compileable = layers[0].is_compileable
        first, second = layers[self.slot].update(first_BSX[:, None], second_BSY[:, None])
        return first[:, 0], second[:, 0]


def extend(history: History | None, first_BSX: Tensor, second_BSY: Tensor) -> tuple[Tensor, Tensor]:
    """``history.extend``; without a history the new positions are all there are."""
    return (first_BSX, second_BSY) if history is None else history.extend(first_BSX, second_BSY)


def visible(
    attention_mask: Tensor | None, queries: slice, keys: int, total_queries: int, device: torch.device
) -> Tensor:
    """Which of ``keys`` positions each of the new positions ``queries`` may look at, bool [B or 1, S, L].

    Its own, and earlier ones that are not padding.

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


def same_document(position_BS: Tensor) -> Tensor:
    """Which positions belong to one document, where several are packed into a row, bool [B, 1, S, S].

    As transformers tells them apart for attention: a document begins where a position is not the one before plus 1.
    """
    begins_BS = F.pad(position_BS.diff(dim=-1) != 1, (1, 0))
    document_BS = begins_BS.cumsum(-1)
    return (document_BS[:, :, None] == document_BS[:, None])[:, None]


def recent(
    token_BS: Tensor, length: int, history: History | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each new position's own token and the ``length`` - 1 before it, newest first, and which of them it may look at.

    Earlier calls' tokens come from ``history``, where these are added. To be called once in a forward pass.

    Args:
        attention_mask: as for ``visible``.

    Returns:
        Token ids [B, S, W], 0 before the beginning; bool [B or 1, S, W], where a position may always see itself.
    """
    new = token_BS.shape[1]
    token_BL1, _ = extend(history, token_BS[..., None], token_BS.new_empty(*token_BS.shape, 0))
    token_BL = token_BL1[..., 0]
    total = token_BL.shape[1]

    def windows(value_BL: Tensor) -> Tensor:
        """The last ``length`` values at each new position, newest first; zeros before the beginning."""
        needed = new + length - 1
        value_BL = F.pad(value_BL[:, -needed:], (max(0, needed - total), 0))
        return value_BL.unfold(1, length, 1).flip(-1)

    own_W = torch.arange(length, device=token_BS.device) == 0
    if attention_mask is None:
        seen_BSW = windows(torch.ones(1, total, dtype=torch.bool, device=token_BS.device))
    elif attention_mask.dim() == 2:
        seen_BSW = windows(attention_mask[:, :total].bool())
    else:
        seen_BSL = visible(attention_mask, slice(0, new), total, new, token_BS.device)
        number_BSW = windows(torch.arange(1, total + 1, device=token_BS.device)[None])  # 0: there is no such position
        index_BSW = (number_BSW - 1).clamp(min=0).expand(len(seen_BSL), -1, -1)
        seen_BSW = seen_BSL.gather(2, index_BSW) & (number_BSW > 0)
    return windows(token_BL), seen_BSW | own_W
