"""Which assignments an expert of limited capacity keeps.

Legend: T tokens, G routing groups, E experts, K choices per token, N = T K assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.moe.rows import count

ROUNDINGS = ("round", "multiple_of_4")


def expert_capacity(
    capacity_factor: float, choices: int, num_experts: int, tokens: int, mask_T: Tensor | None = None
) -> Tensor:
    """ceil(capacity_factor · T · K / E) over the T tokens that are not padding, a scalar on their device."""
    real = torch.tensor(tokens) if mask_T is None else mask_T.sum()
    exact = capacity_factor * choices * real.double() / num_experts
    return (exact - 1e-9).ceil()  # 1.1 · 100 / 10 is a little over 11 in floating point


def group_capacity(
    capacity_factor: float, choices: int, num_experts: int, tokens_G: Tensor, rounding: str = "round"
) -> Tensor:
    """The assignments that an expert takes of each routing group, float64 [G], by V-MoE's rules; of any token, one.

    Args:
        tokens_G: tokens of each group that are not padding.
        rounding: "round": C T K / E to the nearest whole number, halves to the even one (Riquelme et al. 2021);
            "multiple_of_4": up, to a multiple of 4 (their released code).
    """
    exact_G = capacity_factor * choices * tokens_G.double() / num_experts
    if rounding == "multiple_of_4":
        return ((exact_G - 1e-9).ceil() / 4).ceil() * 4
    return torch.maximum(exact_G.round(), (tokens_G > 0).double())


def require_places(capacity_factor: float, choices: int, num_experts: int, tokens: int) -> None:
    """Raise ValueError if by V-MoE's rule a full routing group leaves an expert without any place.

    Then no expert would ever compute or learn anything; the released code refuses that too.
    """
    places = capacity_factor * choices * tokens / num_experts
    if places <= 0.5:  # halves are rounded to even
        raise ValueError(
            f"router.capacity_factor={capacity_factor:g} leaves an expert {places:.2g} places of a routing group of "
            f"{tokens} tokens (C k T / E, k={choices}, E={num_experts}), rounded to none: raise it, group_size or the "
            "micro-batch, or set capacity_factor=null"
        )


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
    if mask_T is not None:
        asked_TK = mask_T[:, None].expand_as(expert_TK) if asked_TK is None else asked_TK & mask_T[:, None]
    order_N = weight_TK.T.reshape(-1).argsort(descending=True, stable=True) if policy == "probability" else None
    place_TK = buffer_places(expert_TK, num_experts, order_N, asked_TK)
    keep_TK = place_TK < capacity
    return keep_TK if asked_TK is None else keep_TK & asked_TK


@torch.no_grad()
def keep_by_priority(
    expert_TK: Tensor,
    num_experts: int,
    capacity_G: Tensor,
    group_T: Tensor,
    score_T: Tensor | None = None,
    mask_T: Tensor | None = None,
) -> Tensor:
    """True for the assignments that V-MoE keeps, bool [T, K]: each expert at most ``capacity_G`` of a routing group.

    In every group all first choices come before all second ones, within a choice tokens of high score before others,
    ties by position (Riquelme et al. 2021).

    Args:
        group_T: the number of each token's group.
        score_T: the higher, the earlier (Batch Prioritized Routing); None: tokens by position alone (vanilla).
    """
    order_N = None
    if score_T is not None:
        order_T = score_T.argsort(descending=True, stable=True)
        order_N = torch.cat([order_T + choice * len(order_T) for choice in range(expert_TK.shape[1])])
    asked_TK = None if mask_T is None else mask_T[:, None].expand_as(expert_TK)
    buffer_TK = group_T[:, None] * num_experts + expert_TK  # an expert has a buffer for each group
    place_TK = buffer_places(buffer_TK, len(capacity_G) * num_experts, order_N, asked_TK)
    keep_TK = place_TK < capacity_G[group_T, None]
    return keep_TK if asked_TK is None else keep_TK & asked_TK


@torch.no_grad()
def buffer_places(
    buffer_TK: Tensor, buffers: int, order_N: Tensor | None = None, asked_TK: Tensor | None = None
) -> Tensor:
    """The place, from 0, that each assignment has in its expert's buffer when these fill up one by one, int64 [T, K].

    Args:
        buffer_TK: which of ``buffers`` each assignment goes to.
        order_N: the assignments, numbered choice by choice and in a choice token by token, in order of priority;
            None: in order of their numbers.
        asked_TK: False for assignments that take nobody's place; their own means nothing. None: all do.
    """
    tokens, choices = buffer_TK.shape
    buffer_N = buffer_TK.T.reshape(-1)  # choice by choice, token by token
    if asked_TK is not None:
        buffer_N = torch.where(asked_TK.T.reshape(-1), buffer_N, buffers)  # one that is not there
    numbers_N = torch.arange(tokens * choices, device=buffer_N.device)
    order_N = numbers_N if order_N is None else order_N
    # A stable sort by buffer lists each one's assignments in priority order.
    order_N = order_N[buffer_N[order_N].argsort(stable=True)]
    count_B = count(buffer_N, buffers + 1)
    start_B = count_B.cumsum(0) - count_B
    place_N = torch.empty_like(buffer_N)
    place_N[order_N] = numbers_N - start_B[buffer_N[order_N]]
    return place_N.reshape(choices, tokens).T
