"""Dropout within experts that does not depend on where they live.

An expert's rows come from all ranks, in an order that the parallel layout decides. So the draws belong to the
assignment: its token's rank gives each one a seed, which travels with the row, and number f of its factors is a hash of
(seed, f) (SplitMix64, Steele et al. 2014). Recomputation and resuming repeat it, as the seeds are keyed like everything
random in a layer.

Legend: N rows or assignments, F their width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.moe.routing import Routing

_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit integers, whose products wrap around
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_SALTS = {"activation": 1, "output": 2}
_BITS = 31


def assignment_seeds(routing: Routing, key: int) -> Tensor:
    """A seed for each assignment, int64 [N], from the micro-batch's ``key``, its token and its expert."""
    number_N = routing.token_N * len(routing.counts_E) + routing.expert_N
    return _mix(_mix(number_N) + key)


def dropout_factors(seed_N: Tensor, width: int, rate: float, purpose: str, dtype: torch.dtype) -> Tensor:
    """Factors [N, width] of dropout: 0 with probability ``rate``, else 1 / (1 - rate)."""
    column_F = torch.arange(width, device=seed_N.device) * _STEP
    drawn_NF = _mix(_mix(seed_N + _SALTS[purpose])[:, None] + column_F) & ((1 << _BITS) - 1)
    return (drawn_NF >= round(rate * (1 << _BITS))).to(dtype) * (1 / (1 - rate))


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser."""
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Right, filling with zeros; torch's own fills with the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
