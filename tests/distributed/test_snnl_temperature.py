"""A learned temperature of SNNL over several ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from s2moe.models.vision import SNNLMoEConfig, SNNLMoEModel
from s2moe.moe.routing import RoutingContext
from tests.distributed_harness import run_distributed

pytestmark = pytest.mark.distributed


def temperature_after_a_step(rank: int, together: bool) -> float:
    torch.manual_seed(0)
    config = SNNLMoEConfig(
        extractor="digits", image_size=8, temperature="learned", initial_temperature=0.5, temperature_rate=0.01
    )
    model = SNNLMoEModel(config).train()
    pixels = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
    model(pixels, torch.arange(8) % 3, RoutingContext(group=dist.group.WORLD if together else None))
    return model.temperature.value.item()


def on_a_rank() -> float:
    return temperature_after_a_step(dist.get_rank(), together=True)


def test_all_ranks_take_the_mean_of_their_steps() -> None:
    alone = [temperature_after_a_step(rank, together=False) for rank in range(2)]
    assert abs(alone[0] - alone[1]) > 1e-5
    together = run_distributed(on_a_rank, 2)
    assert together == pytest.approx([sum(alone) / 2] * 2, rel=1e-6)
