"""Moving rows to experts and back, on regular and ragged lists, against plain loops.

Legend: T tokens, D model, N assignments, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from s2moe.moe.rows import combine_rows, count, gather_rows, place

D, E = 3, 4
# Per token: the experts it is assigned to.
ASSIGNMENTS = {
    "two_each": [[2, 0], [1, 3], [0, 1], [3, 2], [2, 1]],
    "one_each": [[3], [3], [0]],
    "ragged": [[2, 0, 1], [1], [3, 2], [0]],
    "first_without": [[], [1, 0], [2]],
    "last_two_without": [[3, 1], [0], [], []],
    "middle_without": [[0], [], [], [0, 3]],
    "all_without": [[], [], []],
    "no_tokens": [],
    "one_expert_only": [[2], [2], [2], [2]],
}
PARAMETERS = pytest.mark.parametrize("assignments", ASSIGNMENTS.values(), ids=ASSIGNMENTS)


def listed(assignments: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, int, int | None]:
    pairs = [(t, e) for t, experts in enumerate(assignments) for e in experts]
    token_N = torch.tensor([t for t, _ in pairs], dtype=torch.int64)
    expert_N = torch.tensor([e for _, e in pairs], dtype=torch.int64)
    sizes = {len(experts) for experts in assignments}
    return token_N, expert_N, len(assignments), sizes.pop() if len(sizes) == 1 and 0 not in sizes else None


@PARAMETERS
def test_placement_sorts_by_expert_and_keeps_the_order_of_tokens(assignments: list[list[int]]) -> None:
    token_N, expert_N, tokens, choices = listed(assignments)
    want = sorted(range(len(token_N)), key=lambda n: (expert_N[n].item(), token_N[n].item()))
    for k in {choices, None}:  # a regular list may be declared ragged
        placement = place(token_N, expert_N, tokens, k)
        assert placement.order_N.tolist() == want
        assert placement.token_N.tolist() == [token_N[n].item() for n in want]
        assert [placement.place_N[n].item() for n in want] == list(range(len(want)))


@PARAMETERS
@pytest.mark.parametrize("weighted", [False, True])
def test_gather_and_combine_equal_loops_with_gradients(assignments: list[list[int]], weighted: bool) -> None:
    token_N, expert_N, tokens, choices = listed(assignments)
    placement = place(token_N, expert_N, tokens, choices)
    order = placement.order_N.tolist()
    hidden_TD = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    weight_N = torch.rand(len(order), dtype=torch.float64, requires_grad=True)
    factor_ND = torch.randn(len(order), D, dtype=torch.float64)  # stands for what experts do to a row

    rows_ND = gather_rows(hidden_TD, placement)
    assert torch.equal(rows_ND, hidden_TD[placement.token_N])
    got_TD = combine_rows(rows_ND * factor_ND, placement, weight_N if weighted else None)

    want = [torch.zeros(D, dtype=torch.float64) for _ in range(tokens)]
    for row, n in enumerate(order):
        t = token_N[n].item()
        want[t] = want[t] + (weight_N[row] if weighted else 1) * factor_ND[row] * hidden_TD[t]
    want_TD = torch.stack(want) if want else torch.zeros(0, D, dtype=torch.float64)
    torch.testing.assert_close(got_TD, want_TD)

    inputs = [hidden_TD, weight_N] if weighted else [hidden_TD]
    direction_TD = torch.randn(tokens, D, dtype=torch.float64)
    if not want_TD.requires_grad:  # nothing was assigned
        want_TD = want_TD + 0 * hidden_TD.sum() + 0 * weight_N.sum()
    got = torch.autograd.grad((got_TD * direction_TD).sum(), inputs)
    for left, right in zip(got, torch.autograd.grad((want_TD * direction_TD).sum(), inputs), strict=True):
        torch.testing.assert_close(left, right)


@PARAMETERS
def test_gather_and_combine_are_transposes(assignments: list[list[int]]) -> None:
    token_N, expert_N, tokens, choices = listed(assignments)
    placement = place(token_N, expert_N, tokens, choices)
    hidden_TD = torch.randn(tokens, D, dtype=torch.float64)
    rows_ND = torch.randn(len(token_N), D, dtype=torch.float64)
    left = (gather_rows(hidden_TD, placement) * rows_ND).sum()
    torch.testing.assert_close(left, (hidden_TD * combine_rows(rows_ND, placement)).sum())


def test_gradients_equal_finite_differences() -> None:
    token_N, expert_N, tokens, _ = listed(ASSIGNMENTS["middle_without"])
    placement = place(token_N, expert_N, tokens, None)
    hidden_TD = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    rows_ND = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    weight_N = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: gather_rows(h, placement), hidden_TD)
    assert torch.autograd.gradcheck(lambda r, w: combine_rows(r, placement, w), (rows_ND, weight_N))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_survive_activation_recomputation(weighted: bool) -> None:
    token_N, expert_N, tokens, _ = listed(ASSIGNMENTS["ragged"])
    placement = place(token_N, expert_N, tokens, None)
    hidden_TD = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    weight_N = torch.rand(len(token_N), dtype=torch.float64, requires_grad=True)

    def bag(hidden_TD: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
        return combine_rows(gather_rows(hidden_TD, placement).square(), placement, weight_N if weighted else None)

    inputs = [hidden_TD, weight_N][: 1 + weighted]
    wanted = torch.autograd.grad(bag(hidden_TD, weight_N).square().sum(), inputs)
    again_TD = checkpoint(bag, hidden_TD, weight_N, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again_TD.square().sum(), inputs), wanted)


def test_count() -> None:
    assert count(torch.tensor([2, 0, 2, 2]), E).tolist() == [1, 0, 3, 0]
    assert count(torch.tensor([], dtype=torch.int64), E).tolist() == [0] * E
