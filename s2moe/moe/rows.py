"""Moving rows between tokens and experts: gather for dispatch, weighted bag sum for combination.

Both are linear and each other's transpose, so each one's backward is the other. Bags are summed in
a fixed order (no atomic additions), so results are deterministic on every device.

Legend: T tokens (rows of the source), D model, N assignments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2moe.precision import full_precision


class Placement(NamedTuple):
    """Where assignments, listed token by token, stand after sorting them by expert."""

    token_N: Tensor  # int64: the token of the assignment at each sorted place
    order_N: Tensor  # int64: the assignment (token-major number) at each sorted place
    place_N: Tensor  # int64: the sorted place of each assignment; the inverse of order_N
    bag_T: Tensor  # int64: number of the first assignment of each token
    num_tokens: int


def count(expert_N: Tensor, num_experts: int, counted_N: Tensor | None = None) -> Tensor:
    """Assignments of each expert, int64 [E], of those marked in ``counted_N`` only (None: all).

    Unlike ``bincount`` it does not wait for the device.
    """
    ones_N = torch.ones_like(expert_N) if counted_N is None else counted_N.to(expert_N.dtype)
    return expert_N.new_zeros(num_experts).scatter_add_(0, expert_N, ones_N)


@torch.no_grad()
def place(token_N: Tensor, expert_N: Tensor, num_tokens: int, choices: int | None) -> Placement:
    """Sort token-major assignments by expert, keeping the order of tokens within an expert.

    Args:
        choices: K if every token has exactly K assignments; None for a ragged list.
    """
    order_N = expert_N.argsort(stable=True)
    numbers_N = torch.arange(order_N.shape[0], device=order_N.device)  # len() would fix N in an exported program
    place_N = torch.empty_like(order_N).scatter_(0, order_N, numbers_N)
    return Placement(token_N[order_N], order_N, place_N, _bags(token_N, num_tokens, choices), num_tokens)


@torch.no_grad()
def in_order(token_N: Tensor, num_tokens: int, choices: int | None) -> Placement:
    """The placement of assignments that stay token by token; arguments as in ``place``."""
    numbers_N = torch.arange(len(token_N), device=token_N.device)
    return Placement(token_N, numbers_N, numbers_N, _bags(token_N, num_tokens, choices), num_tokens)


def _bags(token_N: Tensor, num_tokens: int, choices: int | None) -> Tensor:
    token_T = torch.arange(num_tokens, device=token_N.device)
    return token_T * choices if choices is not None else torch.searchsorted(token_N, token_T)


def gather_rows(hidden_TD: Tensor, placement: Placement) -> Tensor:
    """The hidden state of each assignment, sorted by expert, [N, D]."""
    return _Gather.apply(hidden_TD, placement)


def combine_rows(rows_ND: Tensor, placement: Placement, weight_N: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, [T, D]; zero for a token without any.

    Args:
        rows_ND: sorted by expert.
        weight_N: factor of each row, sorted by expert; None for 1.
    """
    return _Combine.apply(rows_ND, placement, weight_N)


def unsort_rows(rows_ND: Tensor, placement: Placement) -> Tensor:
    """Rows sorted by expert, in the order of the list of assignments again, [N, D]: a sum over bags of one row each."""
    numbers_N = torch.arange(len(rows_ND), device=rows_ND.device)
    each = placement._replace(token_N=placement.order_N, bag_T=numbers_N, num_tokens=len(rows_ND))
    return combine_rows(rows_ND, each)


def _bag_sum(rows_ND: Tensor, placement: Placement, weight_N: Tensor | None = None) -> Tensor:
    if rows_ND.shape[0] == 0 or placement.num_tokens == 0:
        return rows_ND.new_zeros(placement.num_tokens, rows_ND.shape[1])
    weights = None if weight_N is None else weight_N.to(rows_ND.dtype)[placement.place_N]
    return F.embedding_bag(placement.place_N, rows_ND, placement.bag_T, mode="sum", per_sample_weights=weights)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, placement: Placement) -> Tensor:
        ctx.placement = placement
        return hidden_TD.index_select(0, placement.token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _bag_sum(grad_ND.contiguous(), ctx.placement), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, placement: Placement, weight_N: Tensor | None) -> Tensor:
        ctx.placement = placement
        ctx.save_for_backward(*(() if weight_N is None else (rows_ND, weight_N)))
        return _bag_sum(rows_ND, placement, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor | None]:
        saved = ctx.saved_tensors  # activation recomputation lets them be read once only
        grad_ND = grad_TD.index_select(0, ctx.placement.token_N)
        if not saved:
            return grad_ND, None, None
        rows_ND, weight_N = saved
        grad_weight_N = torch.linalg.vecdot(full_precision(grad_ND), full_precision(rows_ND)).to(weight_N.dtype)
        return grad_ND * weight_N.to(grad_ND.dtype)[:, None], None, grad_weight_N
