"""Balanced assignment: equal shares always, the optimum within the stated bound, an honest certificate.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2moe.moe import auction
from s2moe.moe.auction import Assignment, balanced_assignment
from tests.moe import transport_reference as exact
from tests.moe.test_transport import Waits

KINDS = ("normal", "small", "collapsed", "two", "alike", "zero", "ties", "huge", "heavy")
SIZES = [(64, 8), (61, 8), (65, 8), (71, 8), (8, 8), (5, 8), (1, 4), (3, 2), (96, 3)]


def scores(kind: str, tokens: int, experts: int) -> Tensor:
    normal_TE = torch.randn(tokens, experts, dtype=torch.float64)
    first_E = torch.zeros(experts)
    if kind == "two":
        first_E[:2] = 1.0
        return 0.1 * normal_TE + first_E
    if kind == "collapsed":
        first_E[0] = 5.0
        return normal_TE + first_E
    return {
        "normal": normal_TE,
        "small": 0.02 * normal_TE,
        "alike": normal_TE[:1].expand(tokens, -1),
        "zero": 0 * normal_TE,
        "ties": (2 * normal_TE).round(),
        "huge": 1e4 * normal_TE,
        "heavy": normal_TE.tan(),
    }[kind]


def spread(score_TE: Tensor) -> float:
    width = (score_TE.amax(-1) - score_TE.amin(-1)).max().item()
    return width or 1.0


def attained(found: Assignment, score_TE: Tensor) -> float:
    return sum(row[e].item() for row, e in zip(score_TE, found.expert_T.tolist(), strict=True))


def assert_equal_shares(found: Assignment, tokens: int, experts: int, mask_T: Tensor | None = None) -> None:
    expert_T = found.expert_T if mask_T is None else found.expert_T[mask_T]
    counts = [(expert_T == e).sum().item() for e in range(experts)]
    assert sum(counts) == tokens
    assert {tokens // experts} <= set(counts) <= {tokens // experts, -(-tokens // experts)}


@pytest.mark.parametrize(("tokens", "experts"), [(6, 3), (7, 3), (5, 3), (2, 3), (7, 2), (4, 4)])
def test_the_two_references_agree(tokens: int, experts: int) -> None:
    for _ in range(3):
        score_TE = scores("normal", tokens, experts)
        assert exact.best_sum(score_TE) == pytest.approx(exact.best_sum_by_trial(score_TE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("epsilon", [0.1, 0.01, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "experts"), SIZES)
def test_the_optimum_within_the_bound(tokens: int, experts: int, kind: str, epsilon: float, dtype: torch.dtype) -> None:
    score_TE = scores(kind, tokens, experts).to(dtype)
    found = balanced_assignment(score_TE, epsilon=epsilon, max_rounds=5000)
    assert_equal_shares(found, tokens, experts)
    assert found.completed == 0
    lost = (exact.best_sum(score_TE) - attained(found, score_TE)) / tokens
    rounding = 1e-5 * spread(score_TE)  # of float32
    bound = epsilon * spread(score_TE) * (1 + (-tokens % experts) / tokens + 1 / auction.GRID)
    assert -rounding <= lost <= bound + rounding
    assert lost - rounding <= found.gap.item() <= bound + rounding


@pytest.mark.parametrize("kind", ["normal", "collapsed", "two", "heavy"])
@pytest.mark.parametrize("tokens", [512, 500])
def test_the_measured_gap_at_the_default_is_far_below_the_bound(tokens: int, kind: str) -> None:
    score_TE = scores(kind, tokens, 16).float()
    found = balanced_assignment(score_TE)
    assert found.completed == 0
    lost = (exact.best_sum(score_TE) - attained(found, score_TE)) / tokens
    assert lost < 2e-4 * spread(score_TE)
    assert lost - 1e-6 <= found.gap.item() < 4e-4 * spread(score_TE)


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "experts"), SIZES)
def test_shares_are_equal_and_the_certificate_holds_when_rounds_run_out(
    tokens: int, experts: int, kind: str, rounds: int
) -> None:
    score_TE = scores(kind, tokens, experts)
    found = balanced_assignment(score_TE, epsilon=1e-4, max_rounds=rounds)
    assert found.rounds == rounds
    assert_equal_shares(found, tokens, experts)
    lost = (exact.best_sum(score_TE) - attained(found, score_TE)) / tokens
    assert -1e-9 * spread(score_TE) <= lost <= found.gap.item() + 1e-6 * spread(score_TE)


def test_tokens_left_over_are_reported_and_placed_by_their_scores() -> None:
    """They are few, since the prices begin near where they end, and the sum stays near the optimum."""
    score_TE = scores("ties", 256, 8)
    found = balanced_assignment(score_TE, max_rounds=1)
    assert 0 < found.completed < 0.2
    best, random = exact.best_sum(score_TE), score_TE.sum().item() / 8
    assert attained(found, score_TE) - random > 0.8 * (best - random)


@pytest.mark.parametrize("rounds", [3, 500])
@pytest.mark.parametrize("tokens", [40, 37, 5, 1, 0])
def test_padding_takes_nobodys_place(tokens: int, rounds: int) -> None:
    """The same as without it; padding itself goes to its best expert."""
    score_TE = scores("normal", 48, 8)
    mask_T = torch.zeros(48, dtype=torch.bool)
    mask_T[torch.randperm(48)[:tokens]] = True
    score_TE[~mask_T] += 100 * torch.randn(48 - tokens, 8)
    found = balanced_assignment(score_TE, mask_T, max_rounds=rounds)
    assert_equal_shares(found, tokens, 8, mask_T)
    assert torch.equal(found.expert_T[~mask_T], score_TE[~mask_T].argmax(-1))
    alone = balanced_assignment(score_TE[mask_T], max_rounds=rounds)
    torch.testing.assert_close(found.gap, alone.gap, rtol=1e-4, atol=1e-6)
    assert attained(found, score_TE * mask_T[:, None]) == pytest.approx(attained(alone, score_TE[mask_T]), rel=1e-9)


def test_one_expert_takes_all() -> None:
    assert balanced_assignment(torch.randn(5, 1)).expert_T.tolist() == [0] * 5


def test_rounding_does_not_decide_between_tokens_alike() -> None:
    """Which of two equal tokens goes where is a matter of their order, not of a last digit."""
    score_TE = scores("normal", 5, 4).repeat_interleave(8, 0).float()
    want = balanced_assignment(score_TE).expert_T
    assert sum(len(set(group)) > 1 for group in want.view(5, 8).tolist()) >= 2  # some had to be parted
    for size in (1e-7, 1e-6):
        for _ in range(20):
            assert torch.equal(balanced_assignment(score_TE + size * torch.randn_like(score_TE)).expert_T, want)


def test_the_answer_is_the_same_each_time() -> None:
    score_TE = scores("ties", 200, 8)
    assert torch.equal(balanced_assignment(score_TE).expert_T, balanced_assignment(score_TE).expert_T)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rounds", [2, 500])
def test_broken_scores_end_in_equal_shares(value: float, rounds: int) -> None:
    score_TE = scores("normal", 24, 4)
    score_TE[3] = value
    score_TE[5, 1] = value
    assert_equal_shares(balanced_assignment(score_TE, max_rounds=rounds), 24, 4)


def test_the_host_waits_once_in_many_rounds() -> None:
    score_TE = scores("two", 512, 16)
    with Waits() as waits:
        found = balanced_assignment(score_TE, epsilon=1e-5)
    assert found.rounds > 2 * auction.CHECK_EVERY
    assert waits.count == found.rounds // auction.CHECK_EVERY


def test_a_round_after_the_last_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    score_TE = scores("normal", 61, 8)
    found = balanced_assignment(score_TE)
    monkeypatch.setattr(auction, "CHECK_EVERY", 100)
    later = balanced_assignment(score_TE)
    assert later.rounds > found.rounds
    assert torch.equal(later.expert_T, found.expert_T)
    assert later.gap == found.gap
