"""From a routing to expert outputs: within one process, or across the ranks that share the experts.

Legend: T tokens, D model, N assignments, R rows received, E experts, L experts of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single
from torch.profiler import record_function

from s2moe.moe.expert_dropout import assignment_seeds
from s2moe.moe.experts import Experts
from s2moe.moe.routing import Routing
from s2moe.moe.rows import Placement, combine_rows, gather_rows, in_order, place, unsort_rows
from s2moe.parallel import ExpertParallel
from s2moe.parallel.regions import ALL_TO_ALL, DISPATCH


@record_function(DISPATCH)
def dispatch(
    hidden_TD: Tensor,
    routing: Routing,
    experts: Experts,
    parallel: ExpertParallel,
    dropout_key: int | None = None,
) -> Tensor:
    """Σ over each token's assignments of weight · expert(hidden), [T, D].

    Args:
        dropout_key: of this micro-batch's dropout within experts; None for none.
    """
    placement = place(routing.token_N, routing.expert_N, routing.num_tokens, routing.choices)
    weight_N = routing.weight_N[placement.order_N]
    rows_ND = gather_rows(hidden_TD, placement)
    if parallel.size == 1:
        seed_N = _seeds(routing, placement, dropout_key)
        return combine_rows(experts(rows_ND, routing.counts_E, weight_N, seed_N), placement)
    out_ND = _exchange(rows_ND, routing.counts_E, experts, parallel, _seeds(routing, placement, dropout_key))
    return combine_rows(out_ND, placement, weight_N)


@record_function(DISPATCH)
def expert_outputs(
    hidden_TD: Tensor,
    routing: Routing,
    experts: Experts,
    parallel: ExpertParallel,
    dropout_key: int | None = None,
) -> Tensor:
    """expert(hidden) of each assignment without its weight, in the order of the routing's list, [N, D].

    With gradient for hidden states and experts. For methods that look at the experts one by one; ``dispatch`` never
    holds its [N, D] rows in this order. ``dropout_key`` as there.
    """
    placement = place(routing.token_N, routing.expert_N, routing.num_tokens, routing.choices)
    seed_N = _seeds(routing, placement, dropout_key)
    out_ND = _exchange(gather_rows(hidden_TD, placement), routing.counts_E, experts, parallel, seed_N)
    return unsort_rows(out_ND, placement)


@record_function(DISPATCH)
def combine_outputs(rows_ND: Tensor, routing: Routing) -> Tensor:
    """What ``dispatch`` returns, from ``expert_outputs``: Σ over each token's assignments of weight · row, [T, D]."""
    placement = in_order(routing.token_N, routing.num_tokens, routing.choices)
    return combine_rows(rows_ND, placement, routing.weight_N)


def _seeds(routing: Routing, placement: Placement, dropout_key: int | None) -> Tensor | None:
    """Of each row's dropout, sorted by expert."""
    return None if dropout_key is None else assignment_seeds(routing, dropout_key)[placement.order_N]


def _exchange(
    rows_ND: Tensor, counts_E: Tensor, experts: Experts, parallel: ExpertParallel, seed_N: Tensor | None
) -> Tensor:
    """Send rows to the ranks of their experts, compute, and send the results back to the same places.

    Every rank of the group calls this the same number of times, also with no rows at all. One rank sends nothing.
    """
    if parallel.size == 1:
        return experts(rows_ND, counts_E, seed_N=seed_N)
    counts_PL = counts_E.view(parallel.size, -1)  # what goes to each rank's experts
    received_PL = torch.empty_like(counts_PL)
    with record_function(ALL_TO_ALL):
        dist.all_to_all_single(received_PL, counts_PL.contiguous(), group=parallel.group)
        # The collective needs its split sizes on the host: one copy, for both directions.
        send, receive = torch.stack((counts_PL.sum(1), received_PL.sum(1))).tolist()

    rows_RD = _all_to_all(rows_ND, send, receive, parallel)
    # Rows arrive rank by rank, within a rank sorted by expert; they are needed expert by expert.
    numbers = torch.arange(received_PL.numel(), device=rows_RD.device)
    expert_R = (numbers % received_PL.shape[1]).repeat_interleave(received_PL.view(-1), output_size=sum(receive))
    row_R = torch.arange(sum(receive), device=rows_RD.device)
    placement = place(row_R, expert_R, num_tokens=len(row_R), choices=1)
    seed_R = None
    if seed_N is not None:
        seed_R = torch.empty_like(row_R)
        with record_function(ALL_TO_ALL):
            dist.all_to_all_single(seed_R, seed_N.contiguous(), receive, send, group=parallel.group)
        seed_R = seed_R[placement.order_N]
    out_RD = experts(gather_rows(rows_RD, placement), received_PL.sum(0), seed_N=seed_R)
    return _all_to_all(combine_rows(out_RD, placement), receive, send, parallel)


@record_function(ALL_TO_ALL)
def _all_to_all(rows: Tensor, send: list[int], receive: list[int], parallel: ExpertParallel) -> Tensor:
    output = rows.new_empty(sum(receive), rows.shape[1])
    return all_to_all_single(output, rows.contiguous(), receive, send, group=parallel.group)
