"""Metrics of assignments and loads: confidence, fluctuation, consistency, co-selection, dead experts.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from s2moe.metrics.confidence import margin, token_entropy, weight_entropy
from s2moe.metrics.consistency import correlation, inter_run_consistency
from s2moe.metrics.coselection import (
    coselection,
    coselection_rate,
    cross_selection,
    mutual_information,
    overlap,
)
from s2moe.metrics.fluctuation import fluctuation, last_fluctuation, set_fluctuation, settled
from s2moe.metrics.load import dead_experts, load_figures

from . import reference

T, E = 23, 5


def probabilities() -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64).softmax(-1)


def sets() -> torch.Tensor:
    """Ragged sets of experts, some of them empty, some full."""
    selected_TE = torch.rand(T, E) < 0.4
    selected_TE[0], selected_TE[1] = False, True
    return selected_TE


def numbers(selected_TE: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in selected_TE]


def test_token_entropy_is_the_mean_over_tokens() -> None:
    prob_TE = probabilities()
    want = sum(reference.entropy(row) for row in prob_TE.tolist()) / T
    assert float(token_entropy(prob_TE)) == pytest.approx(want)
    sure = torch.eye(4, dtype=torch.float64)
    assert float(token_entropy(sure)) == 0  # although the mean distribution is even
    assert float(token_entropy(torch.full((3, 4), 0.25))) == pytest.approx(math.log(4))


def test_weight_entropy_leaves_out_tokens_without_experts() -> None:
    weight_TE = torch.tensor([[0.6, 0.2, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    assert float(weight_entropy(weight_TE)) == pytest.approx((reference.entropy([0.6, 0.2]) + 0) / 2)


@pytest.mark.parametrize("choices", [1, 2, E - 1])
def test_margin(choices: int) -> None:
    prob_TE = probabilities()
    want = reference.margin(prob_TE.numpy(), [choices] * T)
    assert float(margin(prob_TE, torch.full((T,), choices))) == pytest.approx(want)


def test_margin_of_ragged_choices() -> None:
    prob_TE, choices_T = probabilities(), sets().sum(-1)
    want = reference.margin(prob_TE.numpy(), choices_T.tolist())
    assert float(margin(prob_TE, choices_T)) == pytest.approx(want)
    assert math.isnan(float(margin(prob_TE, torch.full((T,), E))))
    assert math.isnan(float(margin(torch.ones(T, 1), torch.ones(T, dtype=torch.int64))))


def test_fluctuation() -> None:
    before, now = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 2, 1])
    assert float(fluctuation(before, now)) == 0.5
    assert float(fluctuation(before, before)) == 0


def test_set_fluctuation_is_one_minus_jaccard() -> None:
    before_TE, now_TE = sets(), sets().roll(1, 0)
    want = np.mean([1 - reference.jaccard(a, b) for a, b in zip(numbers(before_TE), numbers(now_TE), strict=True)])
    assert float(set_fluctuation(before_TE, now_TE)) == pytest.approx(float(want))
    assert float(set_fluctuation(before_TE, before_TE)) == 0
    one_T, two_T = torch.randint(0, E, (2, T))
    one_TE, two_TE = (torch.nn.functional.one_hot(at, E).bool() for at in (one_T, two_T))
    assert float(set_fluctuation(one_TE, two_TE)) == float(fluctuation(one_T, two_T))


def test_last_fluctuation_and_its_distribution() -> None:
    steps = [100, 200, 300, 400]
    expert_PT = torch.tensor([[0, 1, 2, 0], [0, 3, 1, 1], [0, 1, 2, 2], [0, 3, 2, 3]])
    last_T = last_fluctuation(steps, expert_PT)
    # Never; at 300 still on 1; at 200 on 1 and back to 2 for good; at 300 on 2.
    assert last_T.tolist() == [0, 300, 200, 300]
    assert settled(last_T, steps) == [0.25, 0.5, 1.0, 1.0]


def test_inter_run_consistency_has_all_pairs_and_the_diagonal() -> None:
    load_RE = torch.rand(4, E, dtype=torch.float64)
    want = np.mean([[reference.pearson(a, b) for b in load_RE.tolist()] for a in load_RE.tolist()])
    assert float(inter_run_consistency(load_RE)) == pytest.approx(float(want))
    opposite = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert float(inter_run_consistency(opposite)) == pytest.approx(0)  # (1 - 1 - 1 + 1) / 4
    assert float(inter_run_consistency(opposite[:1])) == pytest.approx(1)
    assert float(inter_run_consistency(opposite.mul(5).add(1)[[0, 0]])) == pytest.approx(1)


def test_an_even_load_correlates_with_nothing() -> None:
    matrix = correlation(torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 4.0]]))
    assert matrix.isnan().tolist() == [[True, True], [True, False]]


def test_coselection() -> None:
    selected_TE = sets()
    want = [[sum(i in own and j in own for own in numbers(selected_TE)) for j in range(E)] for i in range(E)]
    assert coselection(selected_TE).tolist() == want
    load = [want[i][i] for i in range(E)]
    rate = [[want[i][j] / load[i] for j in range(E)] for i in range(E)]
    torch.testing.assert_close(coselection_rate(selected_TE), torch.tensor(rate, dtype=torch.float64))
    unused = torch.tensor([[True, False], [True, False]])
    assert coselection_rate(unused).tolist() == [[1, 0], [0, 0]]


def test_overlap_of_layers() -> None:
    one_TE, two_TE = sets(), sets().roll(2, 0)
    want = np.mean([reference.jaccard(a, b) for a, b in zip(numbers(one_TE), numbers(two_TE), strict=True)])
    assert float(overlap(one_TE, two_TE)) == pytest.approx(float(want))


def test_mutual_information() -> None:
    one_T, two_T = torch.randint(0, 3, (T,)), torch.randint(0, 4, (T,))
    one_TE, two_TF = torch.nn.functional.one_hot(one_T, 3), torch.nn.functional.one_hot(two_T, 4)
    share = np.zeros((3, 4))
    for a, b in zip(one_T.tolist(), two_T.tolist(), strict=True):
        share[a, b] += 1 / T
    information = sum(
        share[a, b] * math.log(share[a, b] / (share[a].sum() * share[:, b].sum()))
        for a in range(3)
        for b in range(4)
        if share[a, b]
    )
    smaller = min(reference.entropy(share.sum(1)), reference.entropy(share.sum(0)))
    got = mutual_information(cross_selection(one_TE, two_TF))
    assert float(got) == pytest.approx(information / smaller)


def test_mutual_information_does_not_depend_on_numbers() -> None:
    one_TE = torch.nn.functional.one_hot(torch.arange(12) % 4, 4)
    assert float(mutual_information(cross_selection(one_TE, one_TE.flip(1)))) == pytest.approx(1)
    independent = torch.nn.functional.one_hot(torch.arange(12) // 4, 4)
    assert float(mutual_information(cross_selection(one_TE, independent))) == pytest.approx(0, abs=1e-12)
    constant = torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.int64), 4)
    assert math.isnan(float(mutual_information(cross_selection(one_TE, constant))))


def test_load_perplexity_counts_experts() -> None:
    assert load_figures([5, 5, 0, 0])["load_perplexity"] == pytest.approx(0.5)
    assert load_figures([6, 2, 0, 0])["max_load"] == 3


def test_an_expert_is_dead_when_it_rests_for_the_whole_window() -> None:
    loads = [[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]]
    assert [dead_experts(loads, window) for window in (1, 2, 3)] == [0.5, 0.5, 0.0]
