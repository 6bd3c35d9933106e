"""The experts' outputs one by one: every assignment's own row, unweighted, in the order of the list.

Legend: T tokens, D model, E experts, N assignments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.assignments import all_pairs
from s2moe.moe.dispatch import dispatch, expert_outputs
from s2moe.moe.routing import Routing
from s2moe.moe.rows import count
from tests.moe import reference
from tests.moe.test_layer import D, E, experts, layer

T = 6


def routing_of(pairs: list[tuple[int, int]], choices: int | None = None) -> Routing:
    """The (token, expert) pairs as a routing with random weights."""
    token_N, expert_N = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T.contiguous()
    counts_E = count(expert_N, E)
    weight_N = torch.rand(len(pairs), dtype=torch.float64, requires_grad=True)
    return Routing(token_N, expert_N, weight_N, counts_E, counts_E, {}, {}, T, choices)


LISTS: dict[str, tuple[list[tuple[int, int]], int | None]] = {
    "one each": ([(t, (3 * t + 1) % E) for t in range(T)], 1),
    "two each, not in order of experts": ([(t, e) for t in range(T) for e in ((t + 2) % E, t % E)], 2),
    "all": ([(t, e) for t in range(T) for e in range(E)], E),
    "ragged, a token and an expert without": ([(0, 3), (0, 1), (2, 1), (3, 0), (3, 1), (3, 3), (5, 0)], None),
    "none": ([], None),
}


@pytest.mark.parametrize("form", ["gated", "mlp"])
@pytest.mark.parametrize("name", LISTS)
def test_each_row_is_its_experts_output(name: str, form: str) -> None:
    pairs, choices = LISTS[name]
    made, routing = layer(expert_form=form), routing_of(pairs, choices)
    hidden_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    got_ND = expert_outputs(hidden_TD, routing, made.experts, made.parallel)
    w1, w2, w3 = experts(made)
    rows = [reference.expert_mlp(hidden_TD[t], w1[e], w2[e], w3[e], form, "silu") for t, e in pairs]
    assert got_ND.shape == (len(pairs), D)
    if not rows:
        return
    want_ND = torch.stack(rows)
    torch.testing.assert_close(got_ND, want_ND)
    direction_ND = torch.randn_like(want_ND)
    leaves = [hidden_TD, w1, w2, w3]
    found = torch.autograd.grad((got_ND * direction_ND).sum(), leaves)
    wanted = torch.autograd.grad((want_ND * direction_ND).sum(), leaves)
    for left, right in zip(found, wanted, strict=True):
        assert right.any()
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", [name for name in LISTS if name != "none"])
def test_weighted_sums_of_the_rows_are_what_dispatch_gives(name: str) -> None:
    made, routing = layer(), routing_of(*LISTS[name])
    hidden_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

    def summed(rows_ND: Tensor) -> Tensor:
        weighted_ND = routing.weight_N[:, None] * rows_ND
        return torch.stack([weighted_ND[routing.token_N == t].sum(0) for t in range(T)])

    got_TD = summed(expert_outputs(hidden_TD, routing, made.experts, made.parallel))
    want_TD = dispatch(hidden_TD, routing, made.experts, made.parallel)
    torch.testing.assert_close(got_TD, want_TD)
    leaves: list[Any] = [hidden_TD, routing.weight_N, *experts(made)]
    for left, right in zip(
        torch.autograd.grad(got_TD.square().sum(), leaves),
        torch.autograd.grad(want_TD.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_all_pairs_lists_every_expert_for_every_token() -> None:
    routing, by_hand = all_pairs(T, E, torch.device("cpu")), routing_of(*LISTS["all"])
    for name in ("token_N", "expert_N", "counts_E", "load_E", "num_tokens", "choices"):
        left, right = getattr(routing, name), getattr(by_hand, name)
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right, name
    assert routing.weight_N.tolist() == [1.0] * (T * E)


def test_rows_keep_the_dtype_of_the_experts() -> None:
    made = layer().bfloat16()
    hidden_TD = torch.randn(T, D, dtype=torch.bfloat16)
    assert expert_outputs(hidden_TD, all_pairs(T, E, hidden_TD.device), made.experts, made.parallel).dtype == (
        torch.bfloat16
    )
