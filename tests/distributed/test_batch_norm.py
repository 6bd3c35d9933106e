"""Batch normalisation over ranks is that of one process with all images: output, gradients, running statistics."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2moe.parallel.batch_norm import SynchronisedBatchNorm, synchronise_batch_norms
from tests.distributed_harness import run_distributed

pytestmark = pytest.mark.distributed


def images(rank: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 3, *shape, generator=generator, dtype=torch.float64) * (rank + 1) + 100 * rank


def norm(momentum: float | None) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        made.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return made


def results(made: nn.Module, value: Tensor, weight: Tensor) -> list[Tensor]:
    """After two training steps and an evaluation."""
    value.requires_grad_(True)
    for _ in range(2):
        out = made(value)
        (out * weight).sum().backward()
    trained = [out, value.grad, made.weight.grad, made.bias.grad]
    return [tensor.detach() for tensor in (*trained, *made.buffers(), made.eval()(value))]


def on_this_rank(momentum: float | None) -> list[Tensor]:
    model = nn.Sequential(norm(momentum))
    synchronise_batch_norms(model, dist.group.WORLD)
    made = model[0]
    assert isinstance(made, SynchronisedBatchNorm)
    rank = dist.get_rank()
    return results(made, images(rank, (4, 5)), images(rank + 7, (4, 5)))


@pytest.mark.parametrize("momentum", [0.1, pytest.param(None, marks=pytest.mark.slow)])
def test_two_ranks_are_one_process(momentum: float | None) -> None:
    first, second = run_distributed(on_this_rank, 2, momentum)
    value = torch.cat([images(rank, (4, 5)) for rank in range(2)])
    weight = torch.cat([images(rank + 7, (4, 5)) for rank in range(2)])
    whole = results(norm(momentum), value, weight)
    for index in (0, 1, -1):  # of images
        assert torch.cat((first[index], second[index])).allclose(whole[index], rtol=1e-9, atol=1e-9), index
    for index in (2, 3):  # gradients of parameters are added up by the engine
        assert (first[index] + second[index]).allclose(whole[index], rtol=1e-9, atol=1e-9), index
    for index in range(4, len(whole) - 1):  # buffers, equal to the bit on both
        assert first[index].equal(second[index])
        assert first[index].double().allclose(whole[index].double(), rtol=1e-9), index


def test_one_process_keeps_its_own() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    synchronise_batch_norms(model, None)
    assert type(model[0]) is nn.BatchNorm1d
