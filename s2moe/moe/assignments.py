"""From a router's decisions to its answer: what every method does alike.

Legend: T tokens, E experts, K choices per token, N assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.rows import count
from s2moe.objectives.balance import masked_mean


def load_of(expert_TK: Tensor, num_experts: int, mask_T: Tensor | None) -> Tensor:
    """How often real tokens (not padding) chose each expert, int64 [E]."""
    counted_N = None if mask_T is None else mask_T[:, None].expand_as(expert_TK).reshape(-1)
    return count(expert_TK.reshape(-1), num_experts, counted_N)


def per_token(
    expert_TK: Tensor,
    weight_TK: Tensor,
    prob_TE: Tensor,
    context: RoutingContext,
    losses: dict[str, Tensor] | None = None,
    stats: dict[str, Tensor] | None = None,
    load_E: Tensor | None = None,
    feedback: Tensor | None = None,
) -> Routing:
    """Exactly K experts for each token, best first.

    Args:
        weight_TK: carries the router's gradient.
        prob_TE: the router's distribution.
        losses: weighted already.
        load_E: ``load_of`` these experts, where it is known.
    """
    tokens, choices = expert_TK.shape
    num_experts, mask_T = prob_TE.shape[1], context.mask_T
    if load_E is None:
        load_E = load_of(expert_TK, num_experts, mask_T)
    expert_N = expert_TK.reshape(-1)
    return Routing(
        token_N=torch.arange(tokens, device=expert_N.device).repeat_interleave(choices),
        expert_N=expert_N,
        weight_N=weight_TK.reshape(-1),
        counts_E=load_E if mask_T is None else count(expert_N, num_experts),
        load_E=load_E,
        losses=losses or {},
        stats={
            **(stats or {}),
            "router_entropy": mean_entropy(prob_TE, mask_T),
            "first_weight": masked_mean(weight_TK[:, 0].detach(), mask_T),
        },
        num_tokens=tokens,
        choices=choices,
        prob_TE=prob_TE,
        feedback=feedback,
    )


def all_pairs(tokens: int, num_experts: int, device: torch.device) -> Routing:
    """Every expert for every token with weight 1: a token's E assignments are listed in order of experts."""
    counts_E = torch.full((num_experts,), tokens, device=device)
    return Routing(
        token_N=torch.arange(tokens, device=device).repeat_interleave(num_experts),
        expert_N=torch.arange(num_experts, device=device).repeat(tokens),
        weight_N=torch.ones(tokens * num_experts, device=device),
        counts_E=counts_E,
        load_E=counts_E,
        losses={},
        stats={},
        num_tokens=tokens,
        choices=num_experts,
    )


def ragged(
    selected_TE: Tensor,
    weight_TE: Tensor,
    prob_TE: Tensor,
    context: RoutingContext,
    losses: dict[str, Tensor] | None = None,
    stats: dict[str, Tensor] | None = None,
    feedback: Tensor | None = None,
) -> Routing:
    """Any set of (token, expert) pairs: those where ``selected_TE`` is True, with their ``weight_TE``.

    Padding (``context.mask_T`` False) is left out. Waits for the device: the number of pairs decides every shape
    that follows.
    """
    tokens = len(selected_TE)
    if context.mask_T is not None:
        selected_TE = selected_TE & context.mask_T[:, None]
    token_N, expert_N = selected_TE.nonzero(as_tuple=True)
    counts_E = selected_TE.sum(0)
    none_T = (~selected_TE.any(1)).to(weight_TE.dtype)
    return Routing(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weight_TE[token_N, expert_N],
        counts_E=counts_E,
        load_E=counts_E,
        losses=losses or {},
        stats={
            **(stats or {}),
            "router_entropy": mean_entropy(prob_TE, context.mask_T),
            "experts_per_token": counts_E.sum() / _real(context, tokens),
            "tokens_without_expert": masked_mean(none_T, context.mask_T),
        },
        num_tokens=tokens,
        choices=None,
        prob_TE=prob_TE,
        feedback=feedback,
    )


def mean_entropy(prob_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Router confidence: the mean entropy of a token's probabilities, in nats."""
    prob_TE = prob_TE.detach()
    return masked_mean(-torch.special.xlogy(prob_TE, prob_TE).sum(-1), mask_T)


def _real(context: RoutingContext, tokens: int) -> Tensor | int:
    return max(tokens, 1) if context.mask_T is None else context.mask_T.sum().clamp(min=1)


def keep(routing: Routing, kept_N: Tensor) -> Routing:
    """Only the assignments that are True in ``kept_N``; the load stays what tokens asked for.

    Waits for the device: the number of assignments decides every shape that follows.
    """
    expert_N = routing.expert_N[kept_N]
    dropped = 1 - kept_N.sum() / routing.load_E.sum().clamp(min=1)
    return routing._replace(
        token_N=routing.token_N[kept_N],
        expert_N=expert_N,
        weight_N=routing.weight_N[kept_N],
        counts_E=count(expert_N, len(routing.counts_E)),
        stats={**routing.stats, "dropped_fraction": dropped},
        choices=None,
    )
