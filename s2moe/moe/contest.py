"""Choosing the best of many (token, expert) pairs at once, as USMoE and Expert Choice do.

Pairs compete within a group of tokens: a sequence, the micro-batch, or the sequences' tokens at one time step.
Of a group's pairs so many win that its n real tokens have ``budget`` experts each on average. The pairs of all
experts compete with each other (X = 1 contest with n · budget winners), or those of each expert among
themselves (X = E contests with n · budget / E winners each). Winners are counted exactly: a number that is not
whole is rounded up, and among equal scores the earlier token wins.

Legend: T tokens, E experts, G groups, M tokens of a group, X contests in a group, C candidates in each contest,
B budgets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2moe.moe.routing import RoutingContext

SCOPES = ("sequence", "token_batch", "time_step")


class Contest:
    """All pairs of a micro-batch, ranked within their group. Padding never wins and earns its group no winners.

    Args:
        scope: what the groups are: "sequence", "token_batch" or "time_step".
        per_expert: whether each expert's pairs compete among themselves.
    """

    @torch.no_grad()
    def __init__(self, score_TE: Tensor, scope: str, context: RoutingContext, per_expert: bool) -> None:
        self.scope, self.sequences = scope, context.sequences
        score_GME = self._split(score_TE)
        groups, tokens, experts = score_GME.shape
        if context.mask_T is None:
            self.tokens_G = torch.full((groups,), tokens, device=score_TE.device)
        else:
            mask_GM1 = self._split(context.mask_T[:, None])
            score_GME = score_GME.masked_fill(~mask_GM1, -torch.inf)
            self.tokens_G = mask_GM1.sum((1, 2))
        self.shape = score_GME.shape
        score_GCX = score_GME if per_expert else score_GME.reshape(groups, tokens * experts, 1)
        self.score_GCX, order_GCX = score_GCX.sort(dim=1, descending=True, stable=True)
        place_C = torch.arange(score_GCX.shape[1], device=score_TE.device)
        self.place_GCX = torch.empty_like(order_GCX).scatter_(1, order_GCX, place_C[:, None].expand_as(order_GCX))

    @torch.no_grad()
    def winners(self, budget: float) -> Tensor:
        """The chosen pairs, bool [T, E]."""
        won_GCX = self.place_GCX < self._quota([budget])[:, :, None]
        return self._join(won_GCX.reshape(self.shape))

    @torch.no_grad()
    def cutoffs(self, budgets: Sequence[float]) -> Tensor:
        """The score of the last winner for each budget, [G, B, X]; 0 in a group of padding alone."""
        last_GB = (self._quota(budgets) - 1).clamp(min=0)
        cutoff_GBX = self.score_GCX.gather(1, last_GB[:, :, None].expand(-1, -1, self.score_GCX.shape[2]))
        return cutoff_GBX.where((self.tokens_G > 0)[:, None, None], 0.0)

    def _quota(self, budgets: Sequence[float]) -> Tensor:
        """Winners of each contest of a group, int64 [G, B]."""
        share_B = torch.tensor([budget / self.score_GCX.shape[2] for budget in budgets], dtype=torch.float64)
        exact_GB = self.tokens_G[:, None] * share_B.to(self.tokens_G.device, non_blocking=True)
        return (exact_GB - 1e-9).ceil().long()  # 10 · 1.1 is a little over 11 in floating point

    def _split(self, value_TX: Tensor) -> Tensor:
        """[T, X] to [G, M, X]."""
        if self.scope == "token_batch":
            return value_TX[None]
        value_BSX = value_TX.reshape(self.sequences, -1, value_TX.shape[1])
        return value_BSX.transpose(0, 1) if self.scope == "time_step" else value_BSX

    def _join(self, value_GMX: Tensor) -> Tensor:
        """[G, M, X] to [T, X]."""
        if self.scope == "time_step":
            value_GMX = value_GMX.transpose(0, 1)
        return value_GMX.reshape(-1, value_GMX.shape[2])


@torch.no_grad()
def best_of_token(score_TE: Tensor, most: int, among_TE: Tensor | None = None) -> Tensor:
    """Each token's ``most`` best experts (of those in ``among_TE``; fewer where it has fewer), bool [T, E]."""
    if among_TE is not None:
        score_TE = score_TE.masked_fill(~among_TE, -torch.inf)
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter_(1, score_TE.topk(most, dim=-1).indices, True)
    return chosen_TE if among_TE is None else chosen_TE & among_TE
