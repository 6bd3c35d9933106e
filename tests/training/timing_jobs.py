"""What the ranks of the timing tests do."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.data import WindowSampler
from s2moe.training.processes import start_processes
from s2moe.training.run import pretrain


def train_with_a_slow_rank(config_path: str, overrides: list[str]) -> str:
    """Train where rank 1 takes a tenth of a second for each batch of data; the closing table."""
    batch = WindowSampler.batch

    def slow_batch(self: WindowSampler, *arguments: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(0.1)
        return batch(self, *arguments)

    WindowSampler.batch = slow_batch  # type: ignore[method-assign]
    return pretrain(load(RunConfig, config_path, overrides), start_processes()).timing
