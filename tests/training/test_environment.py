"""What a starter leaves in the environment: every wrong value is one line, not a traceback and not another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2moe.config import ConfigError
from s2moe.training import environment, processes
from s2moe.training.environment import hostfile_of
from s2moe.training.processes import describe_process, start_processes

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "gpu1"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        *(
            (TORCHRUN | {name: "x"}, rf"{name} is 'x', and must be a whole number")
            for name in TORCHRUN
            if "_A" not in name
        ),
        *((TORCHRUN | {name: "-1"}, f"{name} is '-1'") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")),
        *((SLURM | {name: "x"}, f"{name} is 'x'") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID")),
        *(({name: "2"}, "mpirun started 2 processes") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")),
        (SLURM | {"SLURM_PROCID": "x"}, "RANK is 'x'"),
        (SLURM | {"SLURM_LOCALID": "1.5"}, "LOCAL_RANK is '1.5'"),
        (SLURM | {"SLURM_NTASKS": ""}, "WORLD_SIZE is not set"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', and must be a whole number of at least 1"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2 of WORLD_SIZE=2: ranks are 0 to 1"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, and ports are at most 65535"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "but not MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT is not set"),
        ({"RANK": "0"}, "RANK=0 is set but not WORLD_SIZE"),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as raised:
        describe_process(dict(given))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("command", "hostfile"),
    [
        ("python /venv/bin/deepspeed --hostfile hosts launcher/pretrain.py --config a.yaml", "hosts"),
        ("python /venv/bin/deepspeed --hostfile=hosts --num_gpus 2 launcher/pretrain.py", "hosts"),
        ("deepspeed -H hosts train.py", "hosts"),
        ("python /venv/bin/deepspeed launcher/pretrain.py --hostfile hosts", None),  # the program's own
        ("python train.py --hostfile hosts", None),
    ],
)
def test_the_hostfile_of_a_command(command: str, hostfile: str | None) -> None:
    assert hostfile_of(command.split()) == hostfile


def test_a_missing_hostfile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed itself warns, and goes on with this machine alone."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "hostfile_of", lambda command: str(tmp_path / "hosts"))
    with pytest.raises(ConfigError, match=r"deepspeed --hostfile: there is no file .*hosts, so the run would go on"):
        start_processes()
    (tmp_path / "hosts").write_text("gpu1 slots=2\n")
    assert processes.missing_hostfile() is None
