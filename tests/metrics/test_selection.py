"""Expert selection in bits against published vectors and sums written out.

Legend: N samples, M experts, C classes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2moe.metrics.selection import (
    Selection,
    entropy_bits,
    mutual_information_bits,
    sample_entropy,
    usage_entropy,
)

GATE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]], dtype=torch.float64)


def information(pairs: list[tuple[int, int]]) -> float:
    """I(E; Y) = Σ p(e, y) log₂ p(e, y) / (p(e) p(y)) of pairs, counted one by one."""
    total, result = len(pairs), 0.0
    for e, y in set(pairs):
        joint = pairs.count((e, y)) / total
        marginals = sum(a == e for a, _ in pairs) / total * sum(b == y for _, b in pairs) / total
        result += joint * math.log2(joint / marginals)
    return result


def random_samples(count: int, experts: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    gate_NM = (3 * torch.randn(count, experts, dtype=torch.float64)).softmax(-1)
    return gate_NM, torch.randint(classes, (count,)), torch.randint(classes, (count,))


def test_published_vectors() -> None:
    assert sample_entropy(GATE).item() == pytest.approx(0.595462, abs=1e-6)
    assert usage_entropy(GATE).item() == pytest.approx(1.0)
    counts = torch.tensor([[4, 1], [1, 4]])
    assert mutual_information_bits(counts).item() == pytest.approx(0.278072, abs=1e-6)


@pytest.mark.parametrize(("experts", "bound"), [(5, 2.3219), (6, 2.5850), (10, 3.3219), (15, 3.9069), (20, 4.3219)])
def test_bounds(experts: int, bound: float) -> None:
    even = torch.full((3, experts), 1 / experts)
    assert sample_entropy(even).item() == pytest.approx(bound, abs=1e-4)
    assert usage_entropy(torch.eye(experts)).item() == pytest.approx(bound, abs=1e-4)
    assert mutual_information_bits(torch.eye(experts)).item() == pytest.approx(bound, abs=1e-4)


def test_certain_gate_has_no_entropy() -> None:
    assert entropy_bits(torch.eye(4)).tolist() == [0, 0, 0, 0]
    assert mutual_information_bits(torch.zeros(3, 4)).item() == 0
    assert mutual_information_bits(torch.outer(torch.arange(1, 4), torch.arange(1, 5))).item() == pytest.approx(0)


def test_sums_of_batches_and_ranks_equal_the_whole() -> None:
    gate_NM, label_N, predicted_N = random_samples(37, 4, 3)
    ranks = [Selection.zero(4, 3), Selection.zero(4, 3)]
    for batch, part in enumerate(torch.arange(37).split(5)):
        ranks[batch % 2].add(gate_NM[part], label_N[part], predicted_N[part])
    ranks[0].totals += ranks[1].totals
    figures = ranks[0].figures()

    entropy_N = [-sum(p * math.log2(p) for p in row) for row in gate_NM.tolist()]
    mean_M = [sum(column) / 37 for column in zip(*gate_NM.tolist(), strict=True)]
    selected = [max(range(4), key=row.__getitem__) for row in gate_NM.tolist()]
    assert figures["h_s"] == pytest.approx(sum(entropy_N) / 37)
    assert figures["h_u"] == pytest.approx(-sum(p * math.log2(p) for p in mean_M))
    assert figures["mi_true"] == pytest.approx(information(list(zip(selected, label_N.tolist(), strict=True))))
    assert figures["mi_pred"] == pytest.approx(information(list(zip(selected, predicted_N.tolist(), strict=True))))
    want = [
        [sum((e, y) == pair for pair in zip(selected, label_N.tolist(), strict=True)) for y in range(3)]
        for e in range(4)
    ]
    assert ranks[0].true_MC.tolist() == want


def test_padding_counts_for_nothing() -> None:
    gate_NM, label_N, predicted_N = random_samples(9, 4, 3)
    valid_N = torch.arange(9) < 6
    padded, plain = Selection.zero(4, 3), Selection.zero(4, 3)
    padded.add(gate_NM, label_N.masked_fill(~valid_N, -100), predicted_N, valid_N)
    plain.add(gate_NM[:6], label_N[:6], predicted_N[:6])
    torch.testing.assert_close(padded.totals, plain.totals)
    assert padded.last_batch_usage_entropy() == pytest.approx(plain.last_batch_usage_entropy())


def test_usage_of_the_last_batch_alone() -> None:
    selection = Selection.zero(2, 2)
    classes = torch.zeros(2, dtype=torch.int64)
    selection.add(GATE[:2], classes, classes)
    selection.add(GATE[2:], classes, classes)
    assert selection.figures()["h_u"] == pytest.approx(1.0)
    assert selection.last_batch_usage_entropy() == pytest.approx(usage_entropy(GATE[2:]).item())


def test_nothing_added_is_not_a_number() -> None:
    assert all(math.isnan(value) for value in Selection.zero(2, 2).figures().values())
