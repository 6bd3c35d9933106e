"""How sure the router is of its choice.

Padding is to be left out before: every row counts. Entropies are in nats.

Legend: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(weight_TE: Tensor) -> Tensor:
    """Entropy of each row, normalised to sum 1, [T]; NaN for a row of zeros."""
    share_TE = weight_TE / weight_TE.sum(-1, keepdim=True)
    return -torch.special.xlogy(share_TE, share_TE).sum(-1)


def token_entropy(prob_TE: Tensor) -> Tensor:
    """Mean entropy of a token's distribution over experts: log E where the router knows nothing, 0 where it is sure.

    Not the entropy of the mean distribution, which measures balance.
    """
    return entropy(prob_TE).mean()


def weight_entropy(weight_TE: Tensor) -> Tensor:
    """Mean entropy of a token's combination weights, over the tokens that have any: log k where they are equal.

    Args:
        weight_TE: zero where an expert was not chosen. Normalised here.
    """
    return entropy(weight_TE.clamp(min=0)).nanmean()


def margin(score_TE: Tensor, choices_T: Tensor) -> Tensor:
    """Mean of the k-th minus the (k+1)-th highest score: how far a token is from changing its experts.

    Args:
        choices_T: each token's k. Tokens with 0 or all experts have no margin and are left out; NaN without any other.
    """
    experts = score_TE.shape[-1]
    if experts == 1:
        return score_TE.new_tensor(torch.nan)
    sorted_TE = score_TE.sort(dim=-1, descending=True).values
    index_T1 = choices_T.clamp(1, experts - 1)[:, None]
    gap_T = (sorted_TE.gather(-1, index_T1 - 1) - sorted_TE.gather(-1, index_T1))[:, 0]
    return gap_T[(choices_T > 0) & (choices_T < experts)].mean()
