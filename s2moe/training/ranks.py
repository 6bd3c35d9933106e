"""The processes of a run, asked about one another; each of these works in one process without a process group too."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process' number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(mine: T) -> list[T]:
    """Every process' value, on all, by rank. Collective."""
    if not dist.is_initialized():
        return [mine]
    values: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values


def from_first(mine: T) -> T:
    """The first process' value, on all. Collective."""
    told = [mine]
    if world() > 1:
        dist.broadcast_object_list(told)
    return told[0]


def barrier() -> None:
    """Wait for all. Collective."""
    if dist.is_initialized():
        dist.barrier()
