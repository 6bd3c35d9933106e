"""Load-balancing and router losses, all in float32, all means over tokens.

Legend: T tokens, E experts, K choices per token, B sequences, S tokens of each. ``mask_T`` is False for padding, which
no loss sees.

Sources: Shazeer et al. 2017 (importance, load), Lepikhin et al. 2020 (GShard), Fedus et al. 2021
(Switch), Zoph et al. 2022 (z-loss), DeepSeek-AI 2024 (sequence-wise balance).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_mean(value_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding (0 where all are)."""
    if mask_T is None:
        return value_T.mean()
    return (value_T * mask_T).sum() / mask_T.sum().clamp(min=1)


def mean_probability(prob_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """P_i: the mean over tokens of each expert's probability, [E]."""
    if mask_T is None:
        return prob_TE.mean(0)
    return (prob_TE * mask_T[:, None]).sum(0) / mask_T.sum().clamp(min=1)


def switch_balance_loss(load_E: Tensor, prob_E: Tensor) -> Tensor:
    """E · Σ_i f_i P_i (Switch, eq. 4): 1 at perfect balance, E at collapse onto one expert.

    Args:
        load_E: assignments of each expert, in any unit; normalised here to fractions f that sum to 1.
            Constant for the gradient. Count first choices only for GShard's form.
        prob_E: mean router probability of each expert.
    """
    fraction_E = load_E / load_E.sum().clamp(min=1)
    return load_E.numel() * (fraction_E.detach() * prob_E).sum()


def sequence_balance_loss(prob_TE: Tensor, choices: int, sequences: int = 1, mask_T: Tensor | None = None) -> Tensor:
    """Switch's loss within each of ``sequences`` equally long sequences, averaged over them (DeepSeek-V3, eq. 17-20).

    E Σ_i f_i P_i, where f_i is the share of a sequence's ``choices`` highest scores that expert i has. The choice is
    taken from ``prob_TE`` itself: a selection bias has no part in it. Sequences of padding alone count for nothing.
    """
    experts = prob_TE.shape[-1]
    prob_BSE = prob_TE.view(sequences, len(prob_TE) // sequences, experts)
    with torch.no_grad():
        chosen_BSE = torch.zeros_like(prob_BSE).scatter_(-1, prob_BSE.topk(choices, dim=-1).indices, 1.0)
        weight_BS1 = torch.ones_like(prob_BSE[..., :1])
        if mask_T is not None:
            weight_BS1 = mask_T.view(weight_BS1.shape).to(prob_BSE.dtype)
        tokens_B1 = weight_BS1.sum(1)
        fraction_BE = (chosen_BSE * weight_BS1).sum(1) / (choices * tokens_B1.clamp(min=1))
    mean_BE = (prob_BSE * weight_BS1).sum(1) / tokens_B1.clamp(min=1)
    return experts * (fraction_BE * mean_BE).sum() / (tokens_B1 > 0).sum().clamp(min=1)


def kl_balance_loss(prob_E: Tensor) -> Tensor:
    """KL(mean probability ‖ uniform) = log E − H(P): 0 at balance, log E at collapse."""
    # Clamped, since without any token P is 0, where the gradient of P log P is not finite.
    return (prob_E * prob_E.clamp(min=torch.finfo(prob_E.dtype).tiny).log()).sum() + math.log(prob_E.numel())


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean squared log-partition (ST-MoE, eq. 5): keeps router logits small."""
    return masked_mean(torch.logsumexp(logits_TE, dim=-1).square(), mask_T)


def cv_squared(value_E: Tensor, unbiased: bool = False) -> Tensor:
    """Squared coefficient of variation over the last dimension, variance / mean² (Shazeer et al., eq. 7).

    Args:
        unbiased: divide by E − 1 in the variance, as Krishnamurthy et al. 2023 do; by default by E.
    """
    return value_E.var(-1, correction=int(unbiased)) / (value_E.mean(-1).square() + 1e-10)


def importance_loss(gate_TE: Tensor, mask_T: Tensor | None = None, unbiased: bool = False) -> Tensor:
    """CV² of each expert's summed gate value (Shazeer et al., eq. 6-7)."""
    if mask_T is not None:
        gate_TE = gate_TE * mask_T[:, None]
    return cv_squared(gate_TE.sum(0), unbiased)


def noisy_load_loss(
    clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, choices: int, mask_T: Tensor | None = None
) -> Tensor:
    """CV² of the smooth load Σ_t Φ((clean − threshold) / σ) (Shazeer et al., appendix A, eq. 8-11).

    The threshold of expert i is the value its noisy logit has to exceed to be chosen given the
    others': the (k+1)-th highest noisy logit where i is chosen now, the k-th where it is not.

    Raises:
        ValueError: if ``choices`` is the number of experts, where the load is constant.
    """
    experts = clean_TE.shape[-1]
    if choices >= experts:
        raise ValueError(f"load_loss needs experts_per_token below the number of experts ({experts})")
    top_TK = noisy_TE.topk(choices + 1, dim=-1).values
    chosen_TE = noisy_TE > top_TK[:, choices, None]
    threshold_TE = torch.where(chosen_TE, top_TK[:, choices, None], top_TK[:, choices - 1, None])
    probability_TE = torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
    if mask_T is not None:
        probability_TE = probability_TE * mask_T[:, None]
    return cv_squared(probability_TE.sum(0))
