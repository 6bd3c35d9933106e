"""Specialisation and difference of experts, against sums written out.

Legend: N samples, M experts, C classes or outputs.
"""

from __future__ import annotations

import math

import pytest
import torch

from s2moe.metrics.selection import Selection
from s2moe.metrics.specialisation import (
    OutputProducts,
    ese_class,
    ese_routing,
    ese_routing_normalised,
    pes_activation,
    pes_weights,
)
from s2moe.objectives.cka import linear_cka


def test_routing_entropy_is_in_nats() -> None:
    gate_NM = torch.randn(20, 4, dtype=torch.float64).softmax(-1)
    want = -sum(p * math.log(p) for row in gate_NM.tolist() for p in row) / 20
    assert ese_routing(gate_NM).item() == pytest.approx(want)
    assert ese_routing_normalised(gate_NM).item() == pytest.approx(want / math.log(4))
    selection = Selection.zero(4, 2)
    selection.add(gate_NM, torch.zeros(20, dtype=torch.int64), torch.zeros(20, dtype=torch.int64))
    assert selection.figures()["h_s"] * math.log(2) == pytest.approx(want)
    even = torch.full((3, 4), 0.25)
    assert ese_routing_normalised(even).item() == pytest.approx(1)
    assert ese_routing(torch.eye(4)).item() == 0
    assert ese_routing_normalised(torch.ones(2, 1)).isnan()


def test_class_entropy_is_that_of_each_expert_weighted_by_its_use() -> None:
    assert ese_class(torch.eye(5)).item() == 0
    assert ese_class(torch.ones(3, 10)).item() == pytest.approx(math.log(10))
    count_MC = torch.tensor([[8, 2], [0, 0], [5, 5]])
    first = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert ese_class(count_MC).item() == pytest.approx((10 * first + 10 * math.log(2)) / 20)


def test_weights_of_each_pair() -> None:
    weight_MX = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-3.0, 0.0]])
    found = pes_weights(weight_MX)
    half = math.sqrt(0.5)
    assert found.matrix_MM[0].tolist() == pytest.approx([1, half, -1])
    assert found.mean == pytest.approx((half - 1 - half) / 3)
    assert found.mean_absolute == pytest.approx((2 * half + 1) / 3)


def test_independent_weights_are_orthogonal_and_copies_alike() -> None:
    weight_MX = torch.randn(6, 20_000)
    assert pes_weights(weight_MX).mean_absolute < 0.02
    assert pes_weights(weight_MX[:1].expand(4, -1)).mean == pytest.approx(1)


def test_activations_of_batches_equal_those_of_all_samples() -> None:
    out_MNC = torch.randn(3, 41, 4, dtype=torch.float64) + 2
    out_MNC[1] = out_MNC[0] @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q + 5  # rotated: the same to CKA
    ranks = [OutputProducts.zero(3, 4), OutputProducts.zero(3, 4)]
    for index, part in enumerate(out_MNC.split(7, dim=1)):
        ranks[index % 2].add(part)
    ranks[0].totals += ranks[1].totals
    cosine, cka = pes_activation(ranks[0])
    centred = [(u - u.mean(0)).flatten() for u in out_MNC]
    for i in range(3):
        for j in range(3):
            want = centred[i] @ centred[j] / centred[i].norm() / centred[j].norm()
            assert cosine.matrix_MM[i, j].item() == pytest.approx(want.item())
            assert cka.matrix_MM[i, j].item() == pytest.approx(linear_cka(out_MNC[i], out_MNC[j]).item())
    assert cka.matrix_MM[0, 1].item() == pytest.approx(1)
    assert abs(cosine.matrix_MM[0, 1].item()) < 0.99
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert cosine.mean == pytest.approx(sum(cosine.matrix_MM[pair].item() for pair in pairs) / 3)
    assert cka.mean_absolute == pytest.approx(sum(abs(cka.matrix_MM[pair].item()) for pair in pairs) / 3)
