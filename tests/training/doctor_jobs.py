"""What the ranks of the doctor's tests do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s2moe.doctor import examine as examination
from s2moe.doctor import network, storage
from s2moe.doctor.finding import merge

HOSTS = ["first", "second"]
CPU = torch.device("cpu")


def examine(output: str) -> dict[str, Any]:
    """The whole examination."""
    network.CPU_BYTES = 2**20
    return examination.examine(Path(output), None, 60.0).as_json()


def clocks(ahead: float) -> Any:
    """On two machines, of which the second one's clock is ahead."""
    if dist.get_rank() == 1:
        now = time.time
        time.time = lambda: now() + ahead
    found: list[Any] = [None, None]
    dist.all_gather_object(found, network.check_clocks(dist.get_rank(), HOSTS))
    return merge(found, HOSTS)[0]


def separate_directories(shared: str) -> Any:
    """Each rank has a directory of its own, which it believes to be the common one."""
    storage.SEEN_WITHIN = 0.3
    found: list[Any] = [None, None]
    own = Path(shared) / str(dist.get_rank())
    dist.all_gather_object(found, storage.check_storage(own, dist.get_rank(), written=2**20))
    return merge(found, HOSTS)[0], [path.name for path in Path(shared).iterdir()]


def one_directory_is_a_file(shared: str) -> Any:
    """Rank 1 cannot make its directory; nobody may wait for it for ever."""
    found: list[Any] = [None, None]
    own = Path(shared) / ("file" if dist.get_rank() == 1 else "directory")
    dist.all_gather_object(found, storage.check_storage(own, dist.get_rank(), written=2**20))
    return merge(found, HOSTS)[0]


def corrupted_exchange() -> Any:
    """An all-to-all whose content is wrong on rank 1."""
    network.CPU_BYTES = 2**16
    exchange = dist.all_to_all_single

    def corrupt(output: torch.Tensor, *arguments: Any, **named: Any) -> None:
        exchange(output, *arguments, **named)
        if dist.get_rank() == 1:
            output[0] += 1

    dist.all_to_all_single = corrupt
    found: list[Any] = [None, None]
    findings, links = network.check_collectives(CPU, HOSTS)
    dist.all_gather_object(found, findings)
    return merge(found, HOSTS), sorted(links)


def slow_device() -> Any:
    """Rank 1 takes ten times as long for a matrix product."""
    seconds = network._seconds
    network._seconds = lambda work, device: seconds(work, device) * (10 if dist.get_rank() == 1 else 1)
    found: list[Any] = [None, None]
    dist.all_gather_object(found, network.check_devices(CPU)[0])
    return merge(found, HOSTS)[0]
