"""launcher/supervise.py with real training: processes are lost, and the run ends as if none had been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed_harness import run_distributed
from tests.training.jobs import tiny_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = [
    "training.steps=240",
    "training.expert_parallel=2",
    "training.timeout_minutes=0.5",
    "evaluation.every=0",
    "checkpoint.every=20",
    "logging.every=10",
    "logging.tensorboard=false",
    "logging.sample_tokens=0",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it is when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    path, overrides = tiny_run(folder)
    assert run_distributed("tests.training.jobs:train", 2, path, [*overrides, *SETTINGS], timeout=300)[0]["finished"]
    return folder / "runs" / "tiny"


@contextlib.contextmanager
def supervise(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The launcher on two processes; it and they are gone afterwards."""
    path, overrides = tiny_run(folder)
    command = [sys.executable, str(REPOSITORY / "launcher" / "supervise.py"), "--processes", "2", *options]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--config", path, *overrides, *SETTINGS],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def rank_pids(supervisor: int) -> dict[int, int]:
    """Process ids of the ranks that run now."""
    found = {}
    for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next((value for value in variables if value.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank.removeprefix(b"RANK="))] = int(child)
    return found


def steps_done(folder: Path) -> int:
    log = folder / "runs" / "tiny" / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def hit(supervisor: subprocess.Popen[str], folder: Path, after: int, rank: int, number: signal.Signals) -> None:
    """Send a rank a signal once the run is beyond a step."""
    deadline = time.monotonic() + 200
    while steps_done(folder) < after or rank not in rank_pids(supervisor.pid):
        assert time.monotonic() < deadline
        assert supervisor.poll() is None
        time.sleep(0.05)
    os.kill(rank_pids(supervisor.pid)[rank], number)


@pytest.mark.timeout(600)
def test_two_losses_change_nothing(whole: Path, tmp_path: Path) -> None:
    with supervise(tmp_path) as supervisor:
        hit(supervisor, tmp_path, 30, 1, signal.SIGKILL)
        hit(supervisor, tmp_path, 90, 0, signal.SIGSTOP)
        printed, _ = supervisor.communicate(timeout=400)
    assert supervisor.returncode == 0, printed
    assert "supervise: rank 1 was killed by SIGKILL" in printed
    assert "Restart 1 of 3, from step " in printed
    assert "error: no progress for 0.5 minutes" in printed
    assert "rank 0 did not end and was killed" in printed
    assert "Restart 2 of 3, from step " in printed
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (tmp_path / "runs" / "tiny", whole))
    assert all(ours[name].equal(weight) for name, weight in theirs.items())


@pytest.mark.timeout(600)
def test_a_process_that_is_lost_twice_is_done_without(whole: Path, tmp_path: Path) -> None:
    with supervise(tmp_path) as supervisor:
        hit(supervisor, tmp_path, 30, 1, signal.SIGKILL)
        hit(supervisor, tmp_path, 90, 1, signal.SIGKILL)
        printed, _ = supervisor.communicate(timeout=400)
    assert supervisor.returncode == 0, printed
    assert "supervise: place 1 failed twice in a row: going on without it" in printed
    assert "it was written with 2 processes, training.expert_parallel=2" in printed
    assert bits_per_byte(tmp_path / "runs" / "tiny") == pytest.approx(bits_per_byte(whole), rel=0.02)


@pytest.mark.timeout(600)
def test_asked_to_stop_it_saves_and_says_so(tmp_path: Path) -> None:
    with supervise(tmp_path) as supervisor:
        deadline = time.monotonic() + 200
        while steps_done(tmp_path) < 30:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        supervisor.send_signal(signal.SIGUSR1)
        printed, _ = supervisor.communicate(timeout=200)
    assert supervisor.returncode == 75, printed
    assert "a signal asked it to stop, and it saved a checkpoint. Not started again" in printed
    stopped = steps_done(tmp_path)
    assert 30 <= stopped < 240
    with supervise(tmp_path) as supervisor:
        printed, _ = supervisor.communicate(timeout=300)
    assert supervisor.returncode == 0, printed
    assert f"continuing from {tmp_path / 'runs' / 'tiny' / 'checkpoints' / f'step-{stopped:08d}'}" in printed


def bits_per_byte(run: Path) -> float:
    """The last validation's figure."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event["val/bpc"] for event in events if "val/bpc" in event][-1]


@pytest.mark.timeout(300)
def test_a_wrong_setting_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    script = str(REPOSITORY / "launcher" / "supervise.py")
    for arguments, message in (
        (["--processes", "3"], "error: training.global_batch: must be a multiple of processes x micro_batch = 3 x 2"),
        (["--processes", "2", "optimizer.lr=nan"], "error: optimizer.lr"),
        (["--processes", "2", "data.dir=nowhere"], "error: nowhere is not a prepared corpus"),
    ):
        result = subprocess.run(
            [sys.executable, script, "--config", path, *overrides, *arguments],
            cwd=tmp_path,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.count(message) == 1
        assert "Restart" not in result.stderr
