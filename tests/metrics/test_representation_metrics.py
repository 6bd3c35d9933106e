"""Metrics of hidden states and experts: collapse, spectrum, similarity.

Legend: N rows, D features, E experts, M probed rows.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from s2moe.metrics.collapse import THRESHOLD, ClassSums, Moments, collapse, representation_collapse
from s2moe.metrics.similarity import cosine, cosine_of, mean_off_diagonal, output_cka, output_cosine
from s2moe.metrics.spectrum import singular_values, singular_values_of, spectrum_figures

from . import reference

N, D = 60, 6


def labelled(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around the centres of unequally large classes, far from the origin."""
    class_N = torch.multinomial(torch.arange(1.0, classes + 1), N, replacement=True)
    class_N[:classes] = torch.arange(classes)
    centre_CD = 2 * torch.randn(classes, D, dtype=torch.float64) + 5
    return centre_CD[class_N] + torch.randn(N, D, dtype=torch.float64), class_N


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_collapse(classes: int) -> None:
    """With fewer classes than features Σ_B is singular: the pseudo-inverse counts."""
    hidden_ND, class_N = labelled(classes)
    want = reference.collapse(hidden_ND.numpy(), class_N.tolist(), THRESHOLD)
    assert float(representation_collapse(hidden_ND, class_N)) == pytest.approx(want, rel=1e-9)


def test_collapse_by_hand() -> None:
    """Two classes at ±2 on one axis, ±1 around them: Tr = 1 / 4; across the axis nothing counts."""
    rows = torch.tensor([[3.0, 7.0], [1.0, -7.0], [-1.0, 7.0], [-3.0, -7.0]])
    # The class means are (2, 0) and (-2, 0): Σ_B = diag(4, 0), Σ_W's first entry is 1.
    assert float(representation_collapse(rows, torch.tensor([0, 0, 1, 1]))) == pytest.approx(0.25)


def test_collapse_shrinks_with_the_classes_and_ignores_scale() -> None:
    hidden_ND, class_N = labelled(4)
    centre_CD = torch.stack([hidden_ND[class_N == c].mean(0) for c in range(4)])
    before = float(representation_collapse(hidden_ND, class_N))
    shrunk_ND = centre_CD[class_N] + 0.1 * (hidden_ND - centre_CD[class_N])
    assert float(representation_collapse(shrunk_ND, class_N)) == pytest.approx(before / 100)
    assert float(representation_collapse(7 * hidden_ND + 3, class_N)) == pytest.approx(before)


def test_collapse_needs_two_classes_and_finite_rows() -> None:
    hidden_ND, class_N = labelled(3)
    assert math.isnan(float(representation_collapse(hidden_ND, torch.zeros_like(class_N))))
    hidden_ND[5, 2] = math.nan
    assert math.isnan(float(representation_collapse(hidden_ND, class_N)))


def test_sums_of_parts_are_the_whole() -> None:
    """As of batches and ranks; and a class number without rows does no harm."""
    hidden_ND, class_N = labelled(4)
    moments, sums = Moments.zero(D, hidden_ND.device), ClassSums.zero(9, D, hidden_ND.device)
    for part in (slice(0, 11), slice(11, 11), slice(11, N)):
        moments.add(hidden_ND[part])
        sums.add(hidden_ND[part], class_N[part])
    assert float(collapse(moments, sums)) == pytest.approx(float(representation_collapse(hidden_ND, class_N)))
    want = torch.from_numpy(np.cov(hidden_ND.numpy(), rowvar=False, bias=True))
    torch.testing.assert_close(moments.covariance(), want)


@pytest.mark.parametrize("rows", [4, N])
def test_spectrum(rows: int) -> None:
    value_ND = torch.randn(rows, D, dtype=torch.float64) * torch.arange(1.0, D + 1) + 3
    sigma = reference.singular_values(value_ND.numpy())
    torch.testing.assert_close(singular_values(value_ND), torch.from_numpy(sigma))
    covariance_DD = torch.from_numpy(np.cov(value_ND.numpy(), rowvar=False, bias=True))
    from_covariance = singular_values_of(covariance_DD, rows)
    assert len(from_covariance) == len(sigma)
    torch.testing.assert_close(from_covariance, torch.from_numpy(sigma), atol=1e-6, rtol=1e-9)
    assert spectrum_figures(singular_values(value_ND)) == pytest.approx(reference.spectrum(sigma))


def test_spectrum_by_hand() -> None:
    """σ = 1, 1: two directions alike. σ = 3, 1: H of (3/4, 1/4), stable rank 10/9."""
    assert spectrum_figures(torch.ones(2)) == pytest.approx(
        {"effective_rank": 2, "stable_rank": 2, "spectral_entropy": 1}
    )
    h = reference.entropy([0.75, 0.25])
    assert spectrum_figures(torch.tensor([3.0, 1.0])) == pytest.approx(
        {"effective_rank": math.exp(h), "stable_rank": 10 / 9, "spectral_entropy": h / math.log(2)}
    )
    one_direction = torch.arange(8.0)[:, None] * torch.tensor([1.0, 2.0, -1.0]) + 100
    assert spectrum_figures(singular_values(one_direction))["effective_rank"] == pytest.approx(1)


def test_spectrum_of_nothing_is_not_a_number() -> None:
    constant = singular_values(torch.ones(5, 3))
    assert all(math.isnan(value) for value in spectrum_figures(constant).values())
    broken = singular_values(torch.full((2, 5, 3), math.nan))
    assert broken.shape == (2, 3)
    assert broken.isnan().all()
    assert singular_values_of(torch.full((3, 3), math.nan), 9).isnan().all()


def test_cosine_of_rows() -> None:
    row_EX = torch.randn(4, 7, dtype=torch.float64)
    want = reference.pairs(list(row_EX.numpy()), reference.cosine)
    torch.testing.assert_close(cosine(row_EX), torch.from_numpy(want))
    pieces = sum(part @ part.T for part in row_EX.split(3, dim=1))
    torch.testing.assert_close(cosine_of(pieces), torch.from_numpy(want))
    assert float(mean_off_diagonal(cosine(row_EX))) == pytest.approx(reference.off_diagonal(want))
    assert cosine(torch.zeros(2, 3)).tolist() == [[0, 0], [0, 0]]
    assert math.isnan(float(mean_off_diagonal(torch.ones(1, 1))))


def outputs() -> torch.Tensor:
    """[E, M, D], related but not alike."""
    common_MD = torch.randn(9, D, dtype=torch.float64)
    return common_MD + torch.randn(3, 9, D, dtype=torch.float64)


def test_cosine_of_outputs_is_the_mean_over_rows() -> None:
    out_EMD = outputs().numpy()
    want = reference.pairs(
        list(out_EMD), lambda a, b: np.mean([reference.cosine(x, y) for x, y in zip(a, b, strict=True)])
    )
    torch.testing.assert_close(output_cosine(torch.from_numpy(out_EMD)), torch.from_numpy(want))


@pytest.mark.parametrize("sigma", [None, 0.4, 0.9])
def test_cka_of_outputs(sigma: float | None) -> None:
    out_EMD = outputs()
    kernel = reference.linear_kernel if sigma is None else lambda rows: reference.rbf_kernel(rows, sigma)
    want = reference.pairs([kernel(rows) for rows in out_EMD.numpy()], reference.cka)
    torch.testing.assert_close(output_cka(out_EMD, sigma), torch.from_numpy(want))


def test_what_cka_does_not_see() -> None:
    """Rotation and scale of one expert's outputs, which the cosine sees."""
    out_MD = torch.randn(9, D, dtype=torch.float64)
    rotation_DD = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    pair = torch.stack((out_MD, 3 * out_MD @ rotation_DD + 1))
    for sigma in (None, 0.8):
        assert float(output_cka(pair, sigma)[0, 1]) == pytest.approx(1)
    assert float(output_cosine(pair)[0, 1]) < 0.9
