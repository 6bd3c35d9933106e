"""The sample similarity loss against sums written out, in float64.

Legend: B samples, M experts, D features.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2moe.objectives.balance import importance_loss
from s2moe.objectives.sample_similarity import sample_distance, sample_similarity_loss

PROB = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]], dtype=torch.float64)
DISTANCE = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0]], dtype=torch.float64)


def sums(prob_BM: Tensor, distance_BB: Tensor) -> tuple[Tensor, Tensor]:
    """Σ d over pairs sent to the same expert, and to different ones, expert by expert."""
    same = different = torch.zeros((), dtype=torch.float64)
    for n, p in enumerate(prob_BM):
        for m, q in enumerate(prob_BM):
            for i in range(len(p)):
                for j in range(len(q)):
                    term = distance_BB[n, m] * p[i] * q[j]
                    same, different = (same + term, different) if i == j else (same, different + term)
    return same, different


def test_published_vector() -> None:
    same, different = sums(PROB, DISTANCE)
    assert (same / 2).item() == pytest.approx(1.88)
    assert (different / 2).item() == pytest.approx(4.12)
    got = sample_similarity_loss(PROB, DISTANCE, 0.01, 0.1, "repo_sum")
    assert got.item() == pytest.approx(-0.02697778, abs=1e-8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["pair_mean", "repo_sum"])
def test_value_and_gradient_equal_the_sums(reduction: str, masked: bool) -> None:
    logits_BM = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    distance_BB = sample_distance(torch.randn(7, 3, dtype=torch.float64))
    valid_B = torch.tensor([True, False, True, True, False, True, True]) if masked else None
    kept = torch.ones(7, dtype=torch.bool) if valid_B is None else valid_B
    same, different = sums(logits_BM.softmax(-1)[kept], distance_BB[kept][:, kept])
    batch = int(kept.sum())
    want = 0.3 * same / batch**2 - 0.2 * different / (batch**2 * 3)
    if reduction == "repo_sum":
        want = 0.3 * same / 4 - 0.2 * different / (batch**2 * 12)
    got = sample_similarity_loss(logits_BM.softmax(-1), distance_BB, 0.3, 0.2, reduction, valid_B)
    torch.testing.assert_close(got, want)
    left, right = (torch.autograd.grad(loss, logits_BM, retain_graph=True)[0] for loss in (got, want))
    torch.testing.assert_close(left, right)


def test_the_two_coefficients_are_one_degree_of_freedom() -> None:
    """β_d's gradient is β_s' times a number: rows of the gate sum to 1."""
    logits_BM = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    distance_BB = sample_distance(torch.randn(5, 3, dtype=torch.float64))
    gradients = [
        torch.autograd.grad(sample_similarity_loss(logits_BM.softmax(-1), distance_BB, *betas), logits_BM)[0]
        for betas in ((1.0, 0.0), (0.0, 1.0))
    ]
    torch.testing.assert_close(gradients[1], gradients[0] / 2)  # M − 1


def test_pair_mean_is_the_code_s_sum_at_the_equivalent_coefficient() -> None:
    distance_BB = sample_distance(torch.randn(3, 5, dtype=torch.float64))
    code = sample_similarity_loss(PROB, distance_BB, 0.01, 0.0, "repo_sum")
    torch.testing.assert_close(sample_similarity_loss(PROB, distance_BB, 0.01 * 9 / 2), code)


@pytest.mark.parametrize("scale", ["batch_max", "none"])
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
def test_distances(distance: str, scale: str) -> None:
    value_BD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    found = sample_distance(value_BD, distance, scale)
    power = 2 if distance == "squared_euclidean" else 1
    want = torch.stack([torch.stack([(x - y).norm() ** power for y in value_BD]) for x in value_BD])
    torch.testing.assert_close(found, (want / want.max() if scale == "batch_max" else want).detach())
    assert not found.requires_grad


def test_one_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="two experts"):
        sample_similarity_loss(torch.ones(3, 1), torch.ones(3, 3), 1.0)


@pytest.mark.parametrize(("unbiased", "value"), [(True, 0.25), (False, 1 / 6)])
def test_importance_of_both_variances(unbiased: bool, value: float) -> None:
    gate_TE = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]], dtype=torch.float64)
    assert importance_loss(gate_TE, unbiased=unbiased).item() == pytest.approx(value, abs=1e-6)
