"""What the processes can do together: clocks, speed of the collectives that training rests on, equal devices.

Bandwidth is what one process sends to others per second, in an all-to-all of equal parts: the number that
expert parallelism lives by. Latency is the time of an all-to-all of a few bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from s2moe.training.ranks import gather

from .finding import Finding, Status, judge, measured

SKEW_WARN, SKEW_FAIL = 1.0, 60.0  # seconds; files of one machine look newer than another's, logs disagree
PINGS, REPEATS = 5, 5
GPU_BYTES, CPU_BYTES = 2**28, 2**25  # sent by each process
SLOW_GPU_MACHINE, SLOW_GPU_NETWORK = 20e9, 5e9  # bytes/s a GPU below which something is wrong
SLOW_DEVICE = {"cuda": 0.9, "cpu": 0.6}  # of the median; CPUs are shared with others


@dataclass(frozen=True)
class Link:
    """A measured all-to-all between `processes`: seconds of an empty one, bytes that each sends per second."""

    processes: int
    latency: float
    bandwidth: float


def check_clocks(rank: int, hosts: Sequence[str]) -> list[Finding]:
    """Difference of this machine's clock from the first process', by the quickest of a few round trips. Collective."""
    firsts = sorted({hosts.index(host) for host in hosts} - {0})
    if not firsts:
        return [Finding("clock", "ok", "one machine")]
    skew = 0.0
    for other in firsts:
        if rank == 0:
            _answer(other)
        elif rank == other:
            skew = min(_ask() for _ in range(PINGS))[1]
    if rank not in firsts:
        return []
    size = abs(skew)
    status: Status = "ok" if size < SKEW_WARN else ("warn" if size < SKEW_FAIL else "fail")
    return [
        measured("clock", 1e3 * size, "ms from the first machine's", status, "synchronise the clocks: chrony or ntpd")
    ]


def _ask() -> tuple[float, float]:
    """(Seconds of the round trip, this clock minus rank 0's)."""
    stamp = torch.zeros(1, dtype=torch.float64)
    begin = time.time()
    dist.send(stamp, 0)
    dist.recv(stamp, 0)
    end = time.time()
    return end - begin, (begin + end) / 2 - float(stamp)


def _answer(other: int) -> None:
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        dist.recv(stamp, other)
        stamp.fill_(time.time())
        dist.send(stamp, other)


def check_collectives(device: torch.device, hosts: Sequence[str]) -> tuple[list[Finding], dict[str, Link]]:
    """All-to-all within each machine and over all processes, measured and its content checked. Collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return [Finding("all-to-all", "ok", "one process: start it under torchrun, deepspeed or srun to test")], {}
    findings, links = [], {}
    machines = [[r for r in range(world) if hosts[r] == host] for host in dict.fromkeys(hosts)]
    for name, groups, slow in (
        ("within a machine", machines if len(machines) > 1 else [], SLOW_GPU_MACHINE),
        ("of all processes", [list(range(world))], SLOW_GPU_NETWORK if len(machines) > 1 else SLOW_GPU_MACHINE),
    ):
        for ranks in groups:
            group = dist.new_group(ranks)  # by all, in the same order
            if rank not in ranks or len(ranks) == 1:
                continue
            found, link = _measure(name, group, len(ranks), device, slow)
            findings += found
            links[name] = link
        dist.barrier()
    return findings, links


def _measure(
    name: str, group: ProcessGroup, size: int, device: torch.device, slow: float
) -> tuple[list[Finding], Link]:
    latency = _seconds(_exchange(group, size, size, device), device)
    elements = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4 // size * size
    exchange = _exchange(group, size, elements, device)
    seconds = _seconds(exchange, device)
    right = torch.equal(exchange(), _expected(group, size, elements, device))
    link = Link(size, latency, 4 * elements * (size - 1) / size / seconds)
    too_slow = device.type == "cuda" and link.bandwidth < slow
    remedy = (
        "far below NVLink or InfiniBand: NCCL_DEBUG=INFO says which way it goes (look for NET/Socket); see that the "
        "network module or the container's devices are there"
    )
    return [
        judge(f"all-to-all {name}", right, "right content" if right else "wrong content", "a broken network or driver"),
        measured(f"  bandwidth {name}", link.bandwidth / 1e9, "GB/s a process", "warn" if too_slow else "ok", remedy),
        measured(f"  latency {name}", 1e6 * link.latency, "us"),
    ], link


def _exchange(group: ProcessGroup, size: int, elements: int, device: torch.device) -> Callable[[], Tensor]:
    """An all-to-all of int32 numbers that say who sent them to whom."""
    own = dist.get_rank(group)
    part = elements // size
    send = (own * size + torch.arange(size, dtype=torch.int32, device=device)).repeat_interleave(part)
    received = torch.empty_like(send)

    def exchange() -> Tensor:
        dist.all_to_all_single(received, send, group=group)
        return received

    return exchange


def _expected(group: ProcessGroup, size: int, elements: int, device: torch.device) -> Tensor:
    senders = torch.arange(size, dtype=torch.int32, device=device)
    return (senders * size + dist.get_rank(group)).repeat_interleave(elements // size)


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Median of a few repeats, after one that sets up the connections."""
    samples = []
    for _ in range(REPEATS + 1):
        _synchronise(device)
        begin = time.perf_counter()
        work()
        _synchronise(device)
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[1:])


def check_devices(device: torch.device) -> tuple[list[Finding], float]:
    """Speed of this process' matrix products, beside the others': one slow device slows all. Collective."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    if dist.is_initialized():
        dist.barrier()  # all at once, as in training
    speed = 2 * size**3 / _seconds(lambda: matrix @ matrix, device)
    slow = speed < SLOW_DEVICE[device.type] * statistics.median(gather(speed))
    remedy = "slower than the others, and all wait for it: look for heat, power limits or other jobs on that machine"
    return [measured("matrix products", speed / 1e12, "TFLOP/s a process", "warn" if slow else "ok", remedy)], speed


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
