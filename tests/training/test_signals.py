"""A signal to any process stops all of them after the same step, with a checkpoint from which they continue."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from s2moe.training.checkpoint import list_complete
from s2moe.training.signals import STOPPED
from tests.distributed_harness import run_distributed

from . import signal_jobs
from .jobs import tiny_run, train
from .test_launcher import REPOSITORY, start

SETTINGS = ["training.expert_parallel=2", "logging.tensorboard=false", "logging.sample_tokens=0"]


def figures(run: Path) -> list[dict[str, Any]]:
    """The losses and figures of validation that a run logged."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k == "step" or k.startswith(("train/", "val/", "layer_"))} for e in events]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("uninterrupted")
    path, overrides = tiny_run(home)
    assert run_distributed(train, 2, path, [*overrides, *SETTINGS])[0]["finished"]
    return home / "runs" / "tiny"


# Validations are after steps 3 and 6, checkpoints after 2, 4 and 6. `call` counts those of one rank.
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("place", "call", "victim", "step", "saved"),
    [("a step", 3, 1, 3, [2, 3]), ("a validation", 1, 0, 4, [2, 4]), ("a checkpoint", 1, 1, 3, [2, 3])],
)
def test_all_stop_after_the_same_step(
    uninterrupted: Path, tmp_path: Path, place: str, call: int, victim: int, step: int, saved: list[int]
) -> None:
    path, overrides = tiny_run(tmp_path)
    overrides += SETTINGS
    results = run_distributed(signal_jobs.stopped, 2, path, overrides, place, call, victim)
    for rank, result in enumerate(results):
        assert (result["finished"], result["signalled"], result["step"], result["saved"]) == (False, True, step, saved)
        assert result["received"] == (signal.SIGUSR1 if rank == victim else None)
    resumed = run_distributed(train, 2, path, overrides)[0]
    assert resumed.get("finished"), resumed.get("error")
    run = tmp_path / "runs" / "tiny"
    assert figures(run) == figures(uninterrupted)
    ours, theirs = (load_file(directory / "hf" / "model.safetensors") for directory in (run, uninterrupted))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.distributed
def test_a_signal_in_the_last_step_does_not_unfinish_the_run(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    overrides += [*SETTINGS, "training.steps=2", "evaluation.every=0"]
    for result in run_distributed(signal_jobs.stopped, 2, path, overrides, "a step", 2, 0):
        assert (result["finished"], result["signalled"], result["step"]) == (True, False, 2)


LAUNCHERS = {
    "python": ([sys.executable], 1, STOPPED),
    "torchrun": ([str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2"], 2, 1),
    "deepspeed": ([str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators=2"], 2, 1),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", LAUNCHERS)
def test_sigterm_to_the_launcher_saves_a_checkpoint(tmp_path: Path, name: str) -> None:
    launcher, processes, status = LAUNCHERS[name]
    path, overrides = tiny_run(tmp_path)
    overrides += [*SETTINGS[1:], f"training.expert_parallel={processes}", "checkpoint.every=0", "evaluation.every=0"]
    run = tmp_path / "runs" / "tiny"
    script = str(REPOSITORY / "launcher" / "pretrain.py")
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            [*launcher, script, "--config", path, *overrides, "training.steps=1000000"],
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 5:
                assert process.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.2)
            os.kill(_launcher_of_ranks(process.pid) if name == "deepspeed" else process.pid, signal.SIGTERM)
            assert process.wait(120) == status, (tmp_path / "output").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    (checkpoint,) = list_complete(run / "checkpoints")
    assert checkpoint.state.step == figures(run)[-1]["step"]
    assert f"after step {checkpoint.state.step}; the same command continues" in (tmp_path / "output").read_text()


@pytest.mark.slow
def test_a_signal_during_the_imports_waits(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    arguments = ["--config", path, *overrides, *SETTINGS[1:], "training.expert_parallel=1"]
    script = str(REPOSITORY / "launcher" / "pretrain.py")
    process = subprocess.Popen([sys.executable, script, *arguments], cwd=tmp_path)
    try:
        blocked = 1 << (signal.SIGUSR1 - 1)
        while not int(_status(process.pid, "SigBlk"), 16) & blocked:
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == STOPPED
    finally:
        process.kill()
    assert [found.state.step for found in list_complete(tmp_path / "runs" / "tiny" / "checkpoints")] == [1]
    assert start(*arguments, cwd=tmp_path).returncode == 0


def _launcher_of_ranks(deepspeed: int) -> int:
    """The process that `deepspeed` starts, which starts the ranks; a SIGTERM to deepspeed itself ends only that."""
    (child,) = Path(f"/proc/{deepspeed}/task/{deepspeed}/children").read_text().split()
    return int(child)


def _status(process: int, key: str) -> str:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
