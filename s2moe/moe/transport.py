"""Balanced routing as entropic optimal transport, solved in the logarithm.

    max over Π > 0 of   ⟨Π, C⟩ − ξ ⟨Π, log Π⟩     with  Π 1 = 1  (every token),  Πᵀ 1 = (T/E) 1  (every expert)

has the solution Π = exp(u + K + v), K = C/ξ, whose potentials Sinkhorn's iteration finds:

    v_i ← log(T/E) − log Σ_t exp(K_ti + u_t)
    u_t ← −log Σ_i exp(K_ti + v_i)

Given v, a row of Π is softmax_i(K_ti + v_i): u needs no room of its own, rows sum to 1 exactly, and what can be
wrong are the sums of the columns. The potential v is a bias of each expert. The first u is that of v = 0, so a
constant added to a token's scores changes nothing.

Everything stays a logarithm: exp(C/ξ), the usual form, overflows at float32 logits of 89.

Legend: T tokens, E experts. ``mask_T`` is False for padding, which has no part in the sums of the columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from s2moe.moe.routing import RoutingContext
from s2moe.options import Checked, option
from s2moe.parallel.expert_parallel import all_reduce_sum

CHECK_EVERY = 10  # iterations between two looks at the residual, each of which waits for the device


@dataclass(kw_only=True)
class TransportOptions(Checked):
    """Options of routers that solve for a balanced plan; a router's own options subclass them."""

    iterations: int = option(20, "Sinkhorn iterations; at most so many where there is a tolerance", least=1, most=10**6)
    tolerance: float | None = option(
        None,
        "stop as soon as every expert's share of the plan is 1/E up to this relative error; looked at every "
        f"{CHECK_EVERY} iterations, since the host has to wait for the device. null: all iterations, without waiting",
        above=0,
    )
    marginals: str = option(
        "local",
        "over which tokens the plan is balanced. local: this rank's micro-batch; global: the micro-batches of all "
        "ranks, at two small all-reduces an iteration",
        choices=("local", "global"),
    )

    def group(self, context: RoutingContext) -> ProcessGroup | None:
        """The ranks whose tokens share the marginals; None for this rank alone."""
        return context.group if self.marginals == "global" else None


@torch.no_grad()
def sinkhorn(
    scaled_TE: Tensor,
    iterations: int,
    mask_T: Tensor | None = None,
    group: ProcessGroup | None = None,
    tolerance: float | None = None,
) -> Tensor:
    """The column potential v of the balanced plan, [E]; the plan is softmax(scaled_TE + v) row by row.

    Args:
        scaled_TE: K = C/ξ, in full precision.
        group: ranks whose tokens the columns sum over. All of them iterate equally often: for a fixed number of
            times, or until a residual that they have in common.
        tolerance: of ``column_error``; None iterates to the end without waiting for the device.
    """
    tokens, experts = scaled_TE.shape
    start_TE = scaled_TE.log_softmax(-1)  # K + u for v = 0
    real = scaled_TE.new_full((), tokens) if mask_T is None else mask_T.sum().to(scaled_TE.dtype)
    log_share = all_reduce_sum(real, group).log() - math.log(experts)
    v_E = scaled_TE.new_zeros(experts)
    for iteration in range(iterations):
        u_T = -torch.logsumexp(start_TE + v_E, dim=-1)
        if mask_T is not None:
            u_T = u_T.masked_fill(~mask_T, -math.inf)
        column_E = _logsumexp_of_columns(start_TE + u_T[:, None], group)
        if tolerance is not None and iteration and iteration % CHECK_EVERY == 0:
            error_E = (column_E + v_E - log_share).expm1().abs()
            if error_E.max().item() < tolerance:  # the same on every rank of the group, as all of it was reduced
                break
        v_E = log_share - column_E
        v_E = torch.where(v_E.isfinite(), v_E, 0)  # without any token there is nothing to balance
    return v_E


def _logsumexp_of_columns(value_TE: Tensor, group: ProcessGroup | None) -> Tensor:
    """log Σ_t exp(value_ti) over the tokens of all ranks in ``group``, [E]; −∞ where there are none."""
    if group is None:
        return torch.logsumexp(value_TE, dim=0)
    peak_E = value_TE.amax(0) if len(value_TE) else value_TE.new_full(value_TE.shape[1:], -math.inf)
    dist.all_reduce(peak_E, op=dist.ReduceOp.MAX, group=group)
    peak_E = peak_E.clamp(min=torch.finfo(peak_E.dtype).min)  # −∞ − −∞ is no number
    return peak_E + all_reduce_sum((value_TE - peak_E).exp().sum(0), group).log()


@torch.no_grad()
def column_error(prob_TE: Tensor, mask_T: Tensor | None = None, group: ProcessGroup | None = None) -> Tensor:
    """max_i |Σ_t Π_ti / (T/E) − 1|: how far from balance the columns of a plan are; 0 without any token."""
    if mask_T is not None:
        prob_TE = prob_TE * mask_T[:, None]
    share_E = all_reduce_sum(prob_TE.sum(0), group)
    total = share_E.sum()  # rows sum to 1
    return torch.where(total > 0, (share_E * share_E.numel() / total - 1).abs().max(), 0)
