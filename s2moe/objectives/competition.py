"""CompeteSMoE's objectives on a competition of experts (Nguyen et al. 2025), in float32, means over tokens.

Legend: T tokens, E experts, K choices per token, D model. ``mask_T`` is False for padding, which no loss sees.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from s2moe.objectives.balance import masked_mean
from s2moe.precision import full_precision


def distillation_loss(
    prob_TE: Tensor, target_TE: Tensor, winner_TK: Tensor, theta: float, mask_T: Tensor | None = None
) -> Tensor:
    """mean_i (p_i - q_i)² + θ mean_{i in S} (p_i - q_i)²: over all experts, and over the token's winners S.

    Args:
        prob_TE: p, the router's distribution.
        target_TE: q, the affinities' distribution; constant for the gradient.
        winner_TK: S.
        theta: θ.
    """
    square_TE = (prob_TE - target_TE.detach()).square()
    return masked_mean(square_TE.mean(-1) + theta * square_TE.gather(-1, winner_TK).mean(-1), mask_T)


def diversity_loss(out_TKD: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean cosine between the outputs of two different experts of a token; 0 at K = 1.

    With unit vectors u, Σ_{i≠j} u_i·u_j = |Σ_i u_i|² - Σ_i |u_i|², so that no [K, K] matrix is made. An output of
    zero is at a right angle to every other, and gets no gradient.
    """
    choices = out_TKD.shape[1]
    out_TKD = full_precision(out_TKD)
    unit_TKD = F.normalize(out_TKD, dim=-1) * out_TKD.detach().any(-1, keepdim=True)
    both_T = unit_TKD.sum(1).square().sum(-1) - unit_TKD.square().sum((1, 2))
    return masked_mean(both_T / max(choices * (choices - 1), 1), mask_T)
