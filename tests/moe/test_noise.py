"""S2MoE's noise: its statistics, and the law of the noisy copy.

Legend: B sequences, S their length, T = B S tokens, D model.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2moe.moe.stochastic import noise_statistics, noisy_copy
from tests.moe import reference

B, S, D = 3, 7, 5
KINDS = ("token_batch", "sequence", "token")


def mean_and_std(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Population mean and standard deviation, each feature by itself."""
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_statistics_equal_the_equations(kind: str, masked: bool) -> None:
    hidden_BSD = torch.randn(B, S, D, dtype=torch.float64) * 3 + 1
    mask_BS = torch.arange(S) >= torch.tensor([[2], [0], [4]])
    hidden_BSD[~mask_BS] = 1000.0 if masked else 0.5
    got = noise_statistics(hidden_BSD.view(-1, D), kind, B, mask_BS.view(-1) if masked else None)
    mean_TD, std_TD = (value.expand(B * S, D).view(B, S, D) for value in got)

    everything = [hidden_BSD[b, s] for b in range(B) for s in range(S) if mask_BS[b, s] or not masked]
    for b in range(B):
        sequence = [hidden_BSD[b, s] for s in range(S) if mask_BS[b, s] or not masked]
        for s in range(S):
            if masked and not mask_BS[b, s]:
                continue
            over = {
                "token_batch": everything,
                "sequence": sequence,
                "token": [x.expand(D) for x in hidden_BSD[b, s]],
            }[kind]
            mean, std = mean_and_std(over)
            torch.testing.assert_close(mean_TD[b, s], mean)
            torch.testing.assert_close(std_TD[b, s], std)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_carry_no_gradient_and_are_float32_for_half_precision(kind: str) -> None:
    hidden_TD = torch.randn(B * S, D, dtype=torch.bfloat16, requires_grad=True)
    for value in noise_statistics(hidden_TD, kind, B):
        assert not value.requires_grad
        assert value.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_constant_features_are_exact(kind: str) -> None:
    """No spread, no noise; and no NaN from a square root of less than zero."""
    mean, std = noise_statistics(torch.full((B * S, D), 7.3), kind, B, torch.arange(B * S) > 3)
    torch.testing.assert_close(mean.expand(B * S, D)[4:], torch.full((B * S - 4, D), 7.3))
    assert torch.isfinite(std).all()
    assert (std.expand(B * S, D)[4:] < 1e-3).all()


def two_draws(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The form of the paper: a x + b with a ~ N(1, σ²) and b ~ N(μ, σ²)."""
    a = 1 + std * torch.randn_like(x)
    b = mean + std * torch.randn_like(x)
    return a * x + b


def test_one_draw_has_the_law_of_two() -> None:
    """Mean x + μ, variance σ² (1 + x²), normal: for both forms, feature by feature."""
    draws = 100_000
    x_D = torch.tensor([-2.0, -0.3, 0.0, 0.7, 5.0], dtype=torch.float64)
    mean_D = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1], dtype=torch.float64)
    std_D = torch.tensor([0.2, 1.5, 1.0, 0.6, 0.05], dtype=torch.float64)
    x_TD = x_D.repeat(draws, 1)
    samples = {
        "one": noisy_copy(x_TD, mean_D, std_D, torch.randn_like(x_TD)),
        "two": two_draws(x_TD, mean_D, std_D),
    }
    for sample_TD in samples.values():
        deviation_D = std_D * (1 + x_D**2) ** 0.5
        normal_TD = (sample_TD - x_D - mean_D) / deviation_D
        assert (normal_TD.mean(0).abs() < 4 / draws**0.5).all()
        assert ((normal_TD.var(0) - 1).abs() < 4 * (2 / draws) ** 0.5).all()
        for d in range(D):
            assert reference.ks_distance_to_normal(normal_TD[:, d]) < 1.95 / draws**0.5
        off_diagonal = torch.corrcoef(normal_TD.T) - torch.eye(D)
        assert off_diagonal.abs().max() < 5 / draws**0.5


def test_one_draw_has_the_expected_gradient_of_two() -> None:
    """d/dx E[f(x̂)] for f = cube: E x̂³ = m³ + 3 m v with m = x + μ, v = σ² (1 + x²)."""
    draws, mean, std = 1_000_000, 0.4, 0.3
    x = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    m, v = x + mean, std**2 * (1 + x**2)
    (want,) = torch.autograd.grad(m**3 + 3 * m * v, x)
    x_TD = x.expand(draws, 1)
    spread = torch.tensor(std, dtype=torch.float64)
    for sample in (
        noisy_copy(x_TD, torch.tensor(mean), spread, torch.randn(draws, 1, dtype=torch.float64)),
        two_draws(x_TD, torch.tensor(mean), spread),
    ):
        (got,) = torch.autograd.grad(sample.pow(3).mean(), x)
        assert got.item() == pytest.approx(want.item(), rel=0.01)


def test_noisy_copy_keeps_the_models_dtype_and_computes_in_float32() -> None:
    hidden_TD, noise_TD = torch.randn(50, D).bfloat16(), torch.randn(50, D)
    mean, std = torch.full((1, D), 0.1), torch.full((1, D), 0.2)
    got = noisy_copy(hidden_TD, mean, std, noise_TD)
    x = hidden_TD.double()
    want = x + 0.1 + 0.2 * (1 + x**2) ** 0.5 * noise_TD.double()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
