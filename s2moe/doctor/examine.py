"""All checks in order, on one process or on all of a job, and their answer."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s2moe.config.run import RunConfig
from s2moe.models.sizes import model_sizes
from s2moe.training.plan import BYTES, OPTIMIZER_BYTES, vocabulary
from s2moe.training.processes import describe_process, gpu_of
from s2moe.training.ranks import gather

from .finding import Finding, Status, merge, worst
from .machine import check_machine
from .network import check_clocks, check_collectives, check_devices
from .storage import check_storage
from .versions import check_versions


@dataclass(frozen=True)
class Examination:
    """What was found. `measured` is what launcher/plan.py reads: speeds of links and devices in SI units."""

    hosts: list[str]
    findings: list[Finding]
    measured: dict[str, Any]

    @property
    def status(self) -> Status:
        return worst(self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "status": self.status,
            "processes": len(self.hosts),
            "machines": len(set(self.hosts)),
            "findings": [asdict(finding) for finding in self.findings],
            "measured": self.measured,
        }


def examine(output: Path, config: RunConfig | None, timeout: float) -> Examination:
    """Run every check; the same answer on all processes.

    Args:
        output: directory that runs will write to.
        config: of the run to come, for the size of its checkpoints.
        timeout: seconds for the processes to meet, and for each collective.
    """
    describe_process(os.environ)
    rank, local_rank, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    host = socket.gethostname()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    own = check_versions()
    machine = check_machine(local_rank, local_world, machines=max(1, world // local_world))
    device = _device(local_rank)
    if world == 1:
        return _alone(own + machine, device, output, config, host)
    try:
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        hosts = gather(host)
        own += [Finding("processes", "ok", f"{world} on {len(set(hosts))} machines, {dist.get_backend()}"), *machine]
        if any(_lacks_gpu(findings) for findings in gather(own)):
            device = torch.device("cpu")  # said already; the rest can still be looked at
        own += check_clocks(rank, hosts)
        own += check_storage(output, rank, _checkpoint_bytes(config))
        found, speed = check_devices(device)
        own += found
        found, links = check_collectives(device, hosts)
        own += found
        measured = {"matmul_flops": speed, "all_to_all": {name: asdict(link) for name, link in links.items()}}
        return Examination(hosts, merge(gather(own), hosts), measured)
    except (RuntimeError, dist.DistError) as error:
        text = " ".join(str(error).split())[:300]
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        remedy = (
            f"processes do not reach one another at {address}, or one has ended: look at the others' "
            "output, at firewalls, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
        )
        return Examination([host], [*own, Finding(f"communication of rank {rank}", "fail", text, remedy)], {})


def _alone(
    findings: list[Finding], device: torch.device, output: Path, config: RunConfig | None, host: str
) -> Examination:
    findings.append(
        Finding("processes", "ok", "one: start it under torchrun, deepspeed or srun to test communication and clocks")
    )
    findings += check_storage(output, 0, _checkpoint_bytes(config))
    found, speed = check_devices(device)
    return Examination([host], merge([findings + found], [host]), {"matmul_flops": speed, "all_to_all": {}})


def _lacks_gpu(findings: list[Finding]) -> bool:
    return any(finding.check == "GPUs" and finding.status == "fail" for finding in findings)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    try:
        device = torch.device("cuda", gpu_of(local_rank, torch.cuda.device_count(), os.environ))
    except ValueError:  # a finding of its own
        return torch.device("cpu")
    torch.cuda.set_device(device)
    return device


def _checkpoint_bytes(config: RunConfig | None) -> float | None:
    """Bytes of the checkpoints that a run keeps, and of the one being written."""
    if config is None:
        return None
    sizes = model_sizes(config.model_config(vocabulary(config)[0]))
    one = sizes.total * (OPTIMIZER_BYTES + BYTES[config.training.precision])
    return float(one * (config.checkpoint.keep + 1))


def table(examination: Examination) -> str:
    """For people: a line a check, and below each that is not ok what to do."""
    marks = {"ok": " ok ", "warn": "WARN", "fail": "FAIL"}
    width = max(len(finding.check) for finding in examination.findings)
    lines = []
    for finding in examination.findings:
        lines.append(f"{marks[finding.status]}  {finding.check:{width}}  {finding.value}")
        if finding.remedy:
            lines.append(f"      {'':{width}}  -> {finding.remedy}")
    failed, warned = (sum(f.status == status for f in examination.findings) for status in ("fail", "warn"))
    summary = f"{len(examination.findings)} checks: {failed} failed, {warned} to look at"
    return "\n".join([*lines, "", summary if failed or warned else f"{len(examination.findings)} checks, all well"])
