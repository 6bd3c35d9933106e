"""Rank and address from what each starter sets."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from launcher.common import user_errors
from s2moe.config import ConfigError
from s2moe.training.errors import ProcessError
from s2moe.training.processes import (
    _free_port,
    describe_process,
    first_host,
    gpu_of,
    start_processes,
    tasks_of_node,
)
from tests.distributed_harness import RANK_ENVIRONMENT, run_distributed


def test_one_process_under_plain_python() -> None:
    environment: dict[str, str] = {}
    describe_process(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 0 < int(environment["MASTER_PORT"]) < 65536


def test_torchrun_and_deepspeed_are_left_alone() -> None:
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    environment = dict(given) | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}  # torchrun inside a Slurm job
    describe_process(environment)
    assert given.items() <= environment.items()


def slurm(rank: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 4),
        "SLURM_NTASKS": "99",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_NODEID": str(rank // 4),
    }


def test_srun_is_mapped_alike_on_every_task() -> None:
    tasks = [slurm(rank) for rank in range(8)]
    for task in tasks:
        describe_process(task)
    assert [task["RANK"] for task in tasks] == [str(rank) for rank in range(8)]
    assert tasks[5]["LOCAL_RANK"] == "1"
    assert {(t["WORLD_SIZE"], t["LOCAL_WORLD_SIZE"], t["MASTER_ADDR"]) for t in tasks} == {("8", "4", "gpu07")}
    ports = {int(task["MASTER_PORT"]) for task in tasks}
    assert len(ports) == 1
    assert 1024 < ports.pop() < 32768  # above, connections are given theirs


def test_neighbouring_jobs_and_steps_have_ports_of_their_own() -> None:
    tasks = [
        slurm(0) | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(50) for step in range(7)
    ]
    for task in tasks:
        describe_process(task)
    assert len({task["MASTER_PORT"] for task in tasks}) == len(tasks)


def test_the_address_of_a_batch_script_is_taken() -> None:
    environment = slurm(3) | {"MASTER_ADDR": "gpu07-ib", "MASTER_PORT": "12345"}
    describe_process(environment)
    assert (environment["RANK"], environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("3", "gpu07-ib", "12345")


@pytest.mark.parametrize(
    ("tasks", "node", "count"), [("4", 0, 4), ("4(x2)", 1, 4), ("8(x2),4", 2, 4), ("1,2(x3)", 0, 1), ("1,2(x3)", 3, 2)]
)
def test_tasks_of_a_node(tasks: str, node: int, count: int) -> None:
    assert tasks_of_node(tasks, node) == count


def test_batch_script_without_srun_is_one_process() -> None:
    environment = slurm(0)
    del environment["SLURM_STEP_ID"]
    describe_process(environment)
    assert environment["WORLD_SIZE"] == "1"


def test_gpu_of_a_process() -> None:
    assert gpu_of(3, 4, {}) == 3
    assert gpu_of(2, 1, {"SLURM_LOCALID": "2"}) == 0  # srun --gpus-per-task=1
    with pytest.raises(ProcessError, match=r"process 2 of this machine has no GPU: 1 are visible\. Start that many"):
        gpu_of(2, 1, {})
    with pytest.raises(ProcessError, match="process 2 of this machine has no GPU"):
        gpu_of(2, 2, {"SLURM_LOCALID": "2"})


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_come_is_waited_for_no_longer_than_the_timeout(rank: int) -> None:
    """Alone of three, by the first one or another; in a process of its own, with its own torch."""
    command = (
        "from s2moe.training.processes import start_processes\n"
        "from s2moe.training.errors import LostProcessError\n"
        "try: start_processes(0.05)\n"
        "except LostProcessError as error: print(error)\n"
    )
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    environment = os.environ | RANK_ENVIRONMENT | {name: str(value) for name, value in place.items()}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    missing = "2 of 3 are missing" if rank == 0 else "rank 0 does not answer there"
    assert f"within 0.05 minutes (training.timeout_minutes), {missing}: " in done.stdout
    assert re.search("imed out after (3000ms|[34] seconds)", done.stdout)  # as torch says it, which rounds


def test_collectives_have_half_as_much_again_as_joining() -> None:
    assert run_distributed(timeouts, 2, 4.0) == [(360.0, 360.0)] * 2


def timeouts(minutes: float) -> tuple[float, float]:
    """Of the store and of a collective, in seconds."""
    start_processes(minutes)
    group = dist.distributed_c10d._get_default_group()
    store = dist.distributed_c10d._get_default_store()
    backend = group._get_backend(torch.device("cpu"))
    return store.timeout.total_seconds(), backend.options._timeout.total_seconds()


def test_an_error_of_one_process_is_printed_by_that_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "5")

    class Left(BaseException):
        pass

    def leave(status: int) -> None:
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    for error in (ConfigError("all say it"), ProcessError("I say it")):
        with pytest.raises(Left), user_errors():
            raise error
    printed = capsys.readouterr().err
    assert "error: I say it" in printed
    assert "[rank 5 on " in printed
    assert "all say it" not in printed


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("login1", "login1"),
        ("a,b", "a"),
        ("gpu[003-010,12],x", "gpu003"),
        ("n[2,4]", "n2"),
        ("rack[1-2]-ib,z", "rack1-ib"),
        ("a-1,b[3-4]", "a-1"),
        ("n[01-02]-ib", "n01-ib"),
        ("rack[0-63]_blade[0-41]", "rack0_blade0"),
        ("r[1,3]c[2-4]n[7],x", "r1c2n7"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
