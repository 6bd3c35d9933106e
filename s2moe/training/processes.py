"""Which process this is, and how the processes of a run find one another.

One launcher serves four starters, which say it differently:
    deepspeed, torchrun   RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set
    srun                  SLURM_* are set; they are mapped to the above
    python                nothing is set: one process
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from s2moe.config.options import ConfigError
from s2moe.parallel import deepspeed_compat

from .environment import check_environment, missing_hostfile, number, refuse_mpirun
from .errors import LostProcessError, ProcessError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run: it logs, and writes what all would write alike."""
        return self.rank == 0


def start_processes(timeout_minutes: float = 30.0) -> Processes:
    """Join the run's process group (NCCL with GPUs, gloo without) and pick this process' device.

    Args:
        timeout_minutes: for the others to join, and then, at half as much again, of every collective: the watchdog,
            which knows more, comes first.

    Raises:
        ConfigError: the environment does not describe a process, see environment.py.
        ProcessError: more processes on this machine than GPUs.
        LostProcessError: not all processes joined in time.
    """
    import deepspeed

    describe_process(os.environ)
    if (hostfile := missing_hostfile()) is not None:
        raise ConfigError(f"deepspeed --hostfile: there is no file {hostfile}, so the run would go on here alone")
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    on_gpu = deepspeed.get_accelerator().device_name() == "cuda"
    if on_gpu:
        device = torch.device("cuda", gpu_of(local_rank, torch.cuda.device_count(), os.environ))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // on_this_machine))
    try:
        deepspeed_compat.init_distributed("nccl" if on_gpu else "gloo", timedelta(minutes=timeout_minutes))
        deepspeed_compat.set_timeout(timedelta(minutes=1.5 * timeout_minutes))
    except dist.DistError as error:  # a store that nobody answers at, or too few joined
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostProcessError(
            f"the {world_size} processes did not all meet at {address} (MASTER_ADDR, MASTER_PORT) within "
            f"{timeout_minutes:g} minutes (training.timeout_minutes){missing_processes(str(error))}: "
            f"{' '.join(str(error).split())[:300]}. Those that do not say this are missing: look at their output, or "
            "whether a firewall is between them"
        ) from error
    return Processes(rank, local_rank, world_size, device)


def missing_processes(error: str) -> str:
    """How many processes did not join, where torch's error tells; it never tells which.

    Only the first process, which keeps the store, is told. Another one that cannot reach it misses the first.
    """
    if match := re.search(r"(\d+)/(\d+) clients joined", error):
        joined, expected = map(int, match.groups())
        return f", {expected - joined} of {expected} are missing"
    if "client socket" in error or "timed out while trying to connect" in error:
        return ", rank 0 does not answer there"
    return ""


def gpu_of(local_rank: int, visible: int, environment: Mapping[str, str]) -> int:
    """The GPU of a process among the `visible` ones.

    Raises:
        ProcessError: there is none left for it.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and environment.get("SLURM_LOCALID") == str(local_rank):
        return 0  # srun --gpus-per-task=1 shows every task its own
    raise ProcessError(
        f"process {local_rank} of this machine has no GPU: {visible} are visible. "
        "Start that many processes, or hide the GPUs with DS_ACCELERATOR=cpu"
    )


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, instead of asking the system for it again at every operation.

    By default large blocks go back at once, and the page faults of getting them anew took a fifth of
    the time of a small model's step on the CPU. Without glibc this does nothing.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)
    mallopt(mmap_threshold, 32 * 2**20)


def stop_processes(together: bool = False) -> None:
    """Leave the process group, so that a finished run ends without warnings.

    `together`: when all processes have come here. A launcher that sees one end with a status ends the others.
    """
    if dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


def describe_process(environment: MutableMapping[str, str]) -> None:
    """Fill in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the starter did not set them.

    Raises:
        ConfigError: what it set is incomplete, or cannot be.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_RANK", "0")
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        for name, value in slurm_process(environment).items():
            environment.setdefault(name, value)
    elif "RANK" in environment:
        raise ConfigError(f"RANK={environment['RANK']} is set but not WORLD_SIZE: set both, or unset RANK")
    else:
        refuse_mpirun(environment)
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    check_environment(environment)


def slurm_process(environment: MutableMapping[str, str]) -> dict[str, str]:
    """This process in the usual variables, from those that srun sets for every task of a job step.

    All tasks derive the same address: the first host, and a port from the job's number, so that two
    jobs on one machine do not meet; below 32768, where Linux gives no connection a port by itself. A batch
    script that has looked for a free one sets MASTER_ADDR and MASTER_PORT. The elements of a job array have
    job numbers of their own.
    """
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    job, step, node = (number(environment, f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "NODEID"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1"),
        "LOCAL_WORLD_SIZE": str(tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or "1", node)),
        "MASTER_ADDR": first_host(hosts),
        "MASTER_PORT": str(10000 + (7 * job + step) % 20000),
    }


def tasks_of_node(tasks: str, node: int) -> int:
    """Tasks on a node of a job step, from Slurm's list: `8(x2),4` is 8 for the nodes 0 and 1, 4 for node 2."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None or not int(match[2] or 1):
            raise ConfigError(f"cannot read the tasks of the nodes in SLURM_STEP_TASKS_PER_NODE={tasks!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(node, len(counts) - 1)]


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: `gpu[003-010,12],login1` is gpu003, `r[0-3]b[7,9]` is r0b7."""
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodelist)
    if match is None:
        raise ConfigError(f"cannot read the Slurm node list {nodelist!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
