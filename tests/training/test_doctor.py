"""The doctor finds what is wrong with a machine or an allocation, and says what to do about it."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher.doctor import main
from s2moe.config import ConfigError
from s2moe.config.run import RunConfig
from s2moe.doctor import examine, machine, versions
from s2moe.doctor.finding import Finding, measured, merge
from s2moe.doctor.storage import check_storage
from tests.distributed_harness import run_distributed

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = ["a", "a", "b", "b"]


def test_findings_of_processes_become_one() -> None:
    same = merge([[Finding("x", "ok", "1")]] * 4, HOSTS)
    assert same == [Finding("x", "ok", "1")]
    speeds = merge([[measured("x", number, "MB/s")] for number in (400.0, 7.0, 500.0, 450.0)], HOSTS)[0]
    assert speeds.value == "7 (rank 1 on a) to 500 MB/s"
    one_bad = merge([[Finding("x", "ok", "1")]] * 3 + [[Finding("x", "warn", "2", "mend it")]], HOSTS)[0]
    assert (one_bad.status, one_bad.remedy) == ("warn", "mend it")
    assert one_bad.value == "1 (rank 0 on a, rank 1 on a, rank 2 on b); 2 (rank 3 on b)"
    differing = [[Finding("torch", "ok", version, alike=True)] for version in ("2.13", "2.13", "2.12", "2.12")]
    assert merge(differing, HOSTS)[0].status == "fail"


def test_versions_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.check: finding for finding in versions.check_versions()}
    assert {finding.status for finding in found.values()} == {"ok"}
    real = versions.metadata.version

    def version(name: str) -> str:
        if name == "accelerate":
            raise versions.metadata.PackageNotFoundError(name)
        return "0.19.7" if name == "deepspeed" else real(name)

    monkeypatch.setattr(versions.metadata, "version", version)
    found = {finding.check: finding for finding in versions.check_versions()}
    assert found["deepspeed"].status == found["accelerate"].status == "fail"
    assert "pip install 'deepspeed==0.19.8'" in found["deepspeed"].remedy
    assert found["accelerate"].value == "not installed"


@pytest.mark.parametrize(
    ("environment", "check", "remedy"),
    [
        ({"OMP_NUM_THREADS": "4096"}, "threads", "OMP_NUM_THREADS="),
        ({"OMP_NUM_THREADS": "0"}, "threads", "OMP_NUM_THREADS="),
        ({"NCCL_IB_DISABLE": "1"}, "environment", "TCP instead of InfiniBand"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "environment", "unset CUDA_LAUNCH_BLOCKING"),
    ],
)
def test_settings_that_slow_down(environment: dict[str, str], check: str, remedy: str) -> None:
    found = [*machine.check_limits(environment, 1, 1), machine.check_settings(environment)]
    finding = next(finding for finding in found if finding.check == check)
    assert finding.status == "warn"
    assert remedy in finding.remedy
    assert {f.status for f in machine.check_limits({}, 1, 1) if f.check == "threads"} == {"ok"}
    assert machine.check_settings({"NCCL_IB_DISABLE": "0"}).status == "ok"


def test_few_open_files_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    monkeypatch.setattr(machine, "available_memory", lambda: 3.0 * 2**30)
    found = {finding.check: finding for finding in machine.check_limits({}, 4, 1)}
    assert found["open files"].status == found["memory a process"].status == "warn"
    assert "ulimit -n 1024" in found["open files"].remedy


def test_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert [finding.status for finding in machine.check_compilers(False)] == ["warn", "warn"]
    monkeypatch.setattr(machine, "_output", lambda command: "Cuda compilation tools, release 11.8, V11.8.89")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    nvcc = machine.check_compilers(True)[-1]
    assert (nvcc.status, nvcc.value) == ("warn", "release 11")


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor = "NVIDIA A100", 8, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(machine, "_output", lambda command: "570.86, 0\n570.86, 3\n")
    found = {finding.check: finding for finding in machine.check_gpus(1, 2)}
    assert found["GPUs"].value == "2 x NVIDIA A100"
    assert found["GPU memory free"].status == "warn"
    assert found["grouped kernel"].status == "warn"
    assert (found["driver"].value, found["ECC errors"].value) == ("570.86", "3")
    assert found["ECC errors"].status == "warn"
    assert machine.check_gpus(2, 3)[0].status == "fail"


def test_room_for_checkpoints(tmp_path: Path, config: RunConfig) -> None:
    found = {finding.check: finding for finding in check_storage(tmp_path / "new", 0, needed=1e18, written=2**20)}
    assert found["disk space"].status == "fail"
    assert "checkpoints need 931,322,574" in found["disk space"].remedy
    assert found["disk speed"].status in ("ok", "warn")
    assert not (tmp_path / "new").exists()
    needed = examine._checkpoint_bytes(config)
    assert needed is not None
    config.checkpoint.keep = 5
    assert examine._checkpoint_bytes(config) == pytest.approx(2 * needed)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    from s2moe.config import load

    from .jobs import tiny_run

    path, overrides = tiny_run(tmp_path)
    return load(RunConfig, path, overrides)


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("_one_process")
def test_exit_status_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]) == 0
    assert "start it under torchrun, deepspeed or srun" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["status"] in ("ok", "warn")
    assert found["measured"]["matmul_flops"] > 1e8
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file" / "runs")]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  output directory" in printed
    assert "-> choose a directory" in printed
    with pytest.raises(ConfigError, match=r"--json: cannot write .*nowhere/found.json: No such file"):
        main(["--output", str(tmp_path / "new" / "runs"), "--json", str(tmp_path / "nowhere" / "found.json")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "error: unrecognized arguments: --bogus (--help explains)"),
        (["training.steps=3"], "error: training.steps=3 needs --config: it changes a setting of the run to come"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith(message)


def test_missing_packages_are_told_without_any_of_them(tmp_path: Path) -> None:
    (tmp_path / "doctor.py").write_text((REPOSITORY / "launcher" / "doctor.py").read_text())
    result = subprocess.run(  # -S: none of the installed packages is found
        [sys.executable, "-S", str(tmp_path / "doctor.py")],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert "has no torch, numpy, yaml, transformers, huggingface_hub, packaging" in result.stdout
    assert "make setup" in result.stdout


@pytest.mark.usefixtures("_one_process")
def test_processes_that_do_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert main(["--output", str(tmp_path), "--timeout", "1"]) == 1
    assert f"processes do not reach one another at 127.0.0.1:{port}" in capsys.readouterr().out


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    first, second = run_distributed("tests.training.doctor_jobs:examine", 2, str(tmp_path))
    assert first["findings"] == second["findings"]
    assert (first["processes"], first["machines"]) == (2, 1)
    assert not [finding for finding in first["findings"] if finding["status"] == "fail"]
    link = first["measured"]["all_to_all"]["of all processes"]
    assert link["processes"] == 2
    assert link["bandwidth"] > 1e6
    assert 0 < link["latency"] < 1


@pytest.mark.slow
@pytest.mark.distributed
def test_what_is_wrong_between_processes(tmp_path: Path) -> None:
    for ahead, status in ((0.0, "ok"), (5.0, "warn"), (-120.0, "fail")):
        clock = run_distributed("tests.training.doctor_jobs:clocks", 2, ahead)[0]
        assert clock.status == status
        assert clock.number == pytest.approx(1e3 * abs(ahead), abs=100)
    directory, left = run_distributed("tests.training.doctor_jobs:separate_directories", 2, str(tmp_path))[0]
    assert directory.status == "fail"
    assert "a directory that all machines share" in directory.remedy
    assert left == []
    (tmp_path / "file").write_text("")
    unusable = run_distributed("tests.training.doctor_jobs:one_directory_is_a_file", 2, str(tmp_path))[0]
    assert unusable.status == "fail"
    assert "(rank 1 on second)" in unusable.value
    findings, links = run_distributed("tests.training.doctor_jobs:corrupted_exchange", 2)[0]
    assert links == ["of all processes"]  # each machine has one process
    assert (findings[0].status, findings[0].check) == ("fail", "all-to-all of all processes")
    assert "wrong content (rank 1 on second)" in findings[0].value
    slow = run_distributed("tests.training.doctor_jobs:slow_device", 2)[0]
    assert slow.status == "warn"
    assert "(rank 1 on second)" in slow.value


@pytest.mark.slow
@pytest.mark.distributed
def test_under_torchrun(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"),
            *(str(REPOSITORY / "launcher" / "doctor.py"), "--output", str(tmp_path / "runs")),
        ],
        cwd=tmp_path,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("bandwidth of all processes") == 1
    assert "2 on 1 machines, gloo" in result.stdout
