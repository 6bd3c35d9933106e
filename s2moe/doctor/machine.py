"""What one process sees of its machine: GPUs, compilers, limits, threads, memory, environment."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Mapping

import torch

from .finding import Finding, Status, judge, measured

SLOW_SETTINGS = {  # a value other than these was set on purpose once, and forgotten
    "NCCL_P2P_DISABLE": "GPUs of a machine then talk through host memory",
    "NCCL_SHM_DISABLE": "processes of a machine then talk through the network",
    "NCCL_IB_DISABLE": "machines then talk through TCP instead of InfiniBand",
    "CUDA_LAUNCH_BLOCKING": "every kernel is then waited for",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is then checked",
}
OPEN_FILES = 4096
SHARED_MEMORY_GIB, MEMORY_GIB = 1.0, 2.0


def check_machine(local_rank: int, local_processes: int, machines: int) -> list[Finding]:
    """All local checks of one process among `local_processes` on its machine."""
    return [
        *check_gpus(local_rank, local_processes),
        *check_compilers(torch.cuda.is_available()),
        *check_limits(os.environ, local_processes, machines),
        check_settings(os.environ),
    ]


def check_gpus(local_rank: int, local_processes: int) -> list[Finding]:
    """Whether this process has a GPU to itself, and a fit one."""
    visible = torch.cuda.device_count()
    if not torch.cuda.is_available():
        there = os.path.exists("/dev/nvidia0")
        remedy = (
            "torch sees no GPU although the machine has one: install torch's build for CUDA, and see nvidia-smi for "
            "the driver"
        )
        return [judge("GPUs", not there, "none, runs go to the CPU" if not there else "not usable", remedy)]
    own = 0 if visible == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank) else local_rank
    if own >= visible:
        return [
            Finding(
                "GPUs",
                "fail",
                f"{visible} for {local_processes} processes",
                "start one process a GPU, or ask the allocation for more GPUs",
            )
        ]
    properties = torch.cuda.get_device_properties(own)
    free, total = torch.cuda.mem_get_info(own)
    major, minor = properties.major, properties.minor
    name = f"{visible} x {properties.name}"
    return [
        Finding("GPUs", "ok", name, alike=True),
        measured(
            "GPU memory free",
            free / 2**30,
            "GiB",
            "ok" if free > 0.9 * total else "warn",
            f"of {total / 2**30:.0f} GiB: another process holds memory, see nvidia-smi",
        ),
        judge(
            "grouped kernel",
            (major, minor) >= (9, 0),
            f"compute capability {major}.{minor}",
            "expert products run one by one below 9.0 (H100): correct, but slower with many small experts",
            "warn",
        ),
        *_driver(),
    ]


def _driver() -> list[Finding]:
    query = ["nvidia-smi", "--query-gpu=driver_version,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    text = _output(query)
    if text is None:
        return [
            Finding("driver", "warn", "nvidia-smi does not answer", "see whether it is installed, and the driver alive")
        ]
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.strip()]
    errors = sum(int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal())
    return [
        Finding("driver", "ok", rows[0][0] if rows else "unknown", alike=True),
        judge(
            "ECC errors", errors == 0, str(errors), "uncorrected memory errors: have the GPU reset or replaced", "warn"
        ),
    ]


def check_compilers(on_gpu: bool) -> list[Finding]:
    """Compilers are needed only by parts of a run, so what is missing is a warning."""
    use = "needed by training.compile and by DeepSpeed's optimizer on the CPU"
    findings = []
    for name, package in (("g++", "g++"), ("ninja", "ninja-build, or pip install ninja")):
        found = shutil.which(name)
        findings.append(judge(name, found is not None, found or "not found", f"{use}: install {package}", "warn"))
    if on_gpu:
        text = _output(["nvcc", "--version"]) or ""
        match = re.search(r"release (\d+)\.", text)
        built = (torch.version.cuda or "").split(".")[0]
        findings.append(
            judge(
                "nvcc",
                match is not None and match[1] == built,
                f"release {match[1]}" if match else "not found",
                f"DeepSpeed's own kernels (optimizer on the CPU) need the CUDA toolkit {built}, as torch was built "
                "with: load its module",
                "warn",
            )
        )
    return findings


def check_limits(environment: Mapping[str, str], local_processes: int, machines: int) -> list[Finding]:
    """Open files, locked memory, shared memory, memory, threads."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cores = len(os.sched_getaffinity(0))
    findings = [
        judge(
            "open files",
            files >= OPEN_FILES,
            f"{files:,} at most",
            f"ulimit -n {min(hard, 65536) if hard > 0 else 65536} in the job script: sockets and files count",
            "warn",
        ),
        _threads(environment, cores, local_processes),
    ]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if torch.cuda.is_available() and machines > 1:
        findings.append(
            judge(
                "locked memory",
                locked == resource.RLIM_INFINITY,
                "unlimited" if locked == resource.RLIM_INFINITY else f"{locked:,} bytes",
                "InfiniBand registers memory: ulimit -l unlimited (limits.conf; PropagateResourceLimits in slurm.conf)",
                "warn",
            )
        )
    shared = shutil.disk_usage("/dev/shm").total / 2**30 if os.path.isdir("/dev/shm") else 0.0
    findings.append(
        measured(
            "/dev/shm",
            shared,
            "GiB",
            "ok" if shared >= SHARED_MEMORY_GIB else "warn",
            "processes of a machine talk through it: start the container with --shm-size=8g or --ipc=host",
        )
    )
    memory = available_memory() / local_processes / 2**30
    findings.append(
        measured(
            "memory a process",
            memory,
            "GiB",
            "ok" if memory >= MEMORY_GIB else "warn",
            "ask the allocation for more memory (--mem), or start fewer processes",
        )
    )
    return findings


def _threads(environment: Mapping[str, str], cores: int, local_processes: int) -> Finding:
    text = environment.get("OMP_NUM_THREADS")
    if text is None:
        return Finding("threads", "ok", f"OMP_NUM_THREADS not set: the launcher shares out {cores} cores")
    status: Status = "ok"
    remedy = f"OMP_NUM_THREADS={max(1, cores // local_processes)}: {local_processes} processes share {cores} cores"
    if not text.isdecimal() or int(text) < 1 or int(text) * local_processes > cores:
        status = "warn"
    return Finding("threads", status, f"OMP_NUM_THREADS={text}, {cores} cores", remedy if status != "ok" else "")


def check_settings(environment: Mapping[str, str]) -> Finding:
    """Environment variables that slow every run down."""
    found = [name for name in SLOW_SETTINGS if environment.get(name, "0") not in ("0", "", "OFF")]
    if not found:
        return Finding("environment", "ok", "nothing that slows down")
    reasons = "; ".join(f"unset {name}: {SLOW_SETTINGS[name]}" for name in found)
    return Finding("environment", "warn", ", ".join(f"{name}={environment[name]}" for name in found), reasons)


def available_memory() -> float:
    """Bytes that this process' machine, or its control group, has left."""
    left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            left = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
        if limit.isdecimal():
            left = min(left, int(limit) - used)
    except (OSError, StopIteration, ValueError):
        pass
    return float(left)


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
