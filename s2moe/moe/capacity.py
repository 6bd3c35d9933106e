"""Which assignments an expert of limited capacity keeps.

Legend: T tokens, E experts, K choices per token, N = T K assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.moe.rows import count


def expert_capacity(
    capacity_factor: float, choices: int, num_experts: int, tokens: int, mask_T: Tensor | None = None
) -> Tensor:
    """ceil(capacity_factor · T · K / E) over the T tokens that are not padding, a scalar on their device."""
    real = torch.tensor(tokens) if mask_T is None else mask_T.sum()
    exact = capacity_factor * choices * real.double() / num_experts
    return (exact - 1e-9).ceil()  # 1.1 · 100 / 10 is a little over 11 in floating point


@torch.no_grad()
def keep_within_capacity(
    expert_TK: Tensor,
    weight_TK: Tensor,
    num_experts: int,
    capacity: Tensor | int,
    policy: str,
    mask_T: Tensor | None = None,
    asked_TK: Tensor | None = None,
) -> Tensor:
    """True for the at most ``capacity`` assignments that each expert keeps, bool [T, K].

    Padding (``mask_T`` False) keeps none and takes nobody's place.

    Args:
        policy: "position" ranks all first choices before all second choices, and earlier tokens
            before later ones within a choice (GShard, algorithm 1); "probability" ranks by weight,
            highest first, ties by position.
        asked_TK: False for assignments that are given up before (None: none are); they take nobody's place.
    """
    tokens, choices = expert_TK.shape
    expert_N = expert_TK.T.reshape(-1)  # choice by choice, token by token
    if mask_T is not None:
        expert_N = torch.where(mask_T.repeat(choices), expert_N, num_experts)  # an expert that is not there
    if asked_TK is not None:
        expert_N = torch.where(asked_TK.T.reshape(-1), expert_N, num_experts)
    if policy == "probability":
        order_N = weight_TK.T.reshape(-1).argsort(descending=True, stable=True)
    else:
        order_N = torch.arange(tokens * choices, device=expert_N.device)
    # A stable sort by expert lists each expert's assignments in priority order.
    order_N = order_N[expert_N[order_N].argsort(stable=True)]
    count_E = count(expert_N, num_experts + 1)
    start_E = count_E.cumsum(0) - count_E
    place_N = torch.arange(tokens * choices, device=expert_N.device) - start_E[expert_N[order_N]]
    keep_N = torch.empty_like(expert_N, dtype=torch.bool)
    keep_N[order_N] = place_N < capacity
    return (keep_N & (expert_N < num_experts)).reshape(choices, tokens).T
