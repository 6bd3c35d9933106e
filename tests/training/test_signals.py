"""A signal to any process stops all of them after the same step, with a checkpoint from which they continue."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launcher import common
from s2moe.training import signals
from s2moe.training.checkpoint import list_complete
from s2moe.training.signals import STOPPED, catch_stop_signals, losing, loss, stop_signal
from tests.distributed_harness import run_distributed
from tests.forked import Ended, forked

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


# --- Ctrl-C, a closed terminal -----------------------------------------------------------------------


def caught(action: Callable[[], Any], limit: float = 60.0) -> Ended:
    """What `action` does in a process that catches signals, with a second Ctrl-C after 0.3 s."""

    def child() -> None:
        signals.AGAIN_SECONDS = 0.3
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        catch_stop_signals()
        with losing(lambda: loss(7, 4)):
            action()

    return forked(child, limit=limit)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.02)


def print_received() -> None:
    time.sleep(0.1)
    received = stop_signal()
    print(received.name if received else "none")


def test_ctrl_c_and_a_closed_terminal_ask_to_stop() -> None:
    ended = caught(lambda: (send(signal.SIGHUP), print_received()))
    assert (ended.status, ended.output, ended.errors) == (0, "SIGHUP\n", "")
    # From the terminal, and once more from each launcher that passes it on: one Ctrl-C all the same.
    ended = caught(lambda: (send(signal.SIGINT, signal.SIGINT, signal.SIGTERM), print_received()))
    assert (ended.status, ended.output) == (0, "SIGINT\n")
    assert ended.errors.strip() == signals.HINT


def wait_for_ever() -> None:
    """As a collective does: no handler runs in this thread."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def test_a_second_ctrl_c_ends_the_process_wherever_it_waits() -> None:
    def twice() -> None:
        threading.Timer(0.2, send, [signal.SIGINT]).start()
        threading.Timer(1.5, send, [signal.SIGINT]).start()
        wait_for_ever()

    ended = caught(twice)
    assert ended.status == signals.INTERRUPTED == 130
    assert ended.errors.split("\n")[-2] == (
        "interrupted after step 7: the 3 steps since the checkpoint of step 4 will be done again by the same command"
    )


@pytest.mark.parametrize("number", signals.TERMINAL_SIGNALS)
def test_what_nohup_ignores_stays_ignored(number: signal.Signals) -> None:
    def child() -> None:
        signal.signal(number, signal.SIG_IGN)
        catch_stop_signals()
        send(number)
        print_received()

    assert forked(child).output == "none\n"


def test_what_is_lost() -> None:
    assert "there is no checkpoint yet, and the same command begins anew" in loss(3, None)
    assert "the same command continues from there" in loss(3, 3)
    assert "the step since the checkpoint of step 2" in loss(3, 2)


def test_ctrl_c_while_modules_are_imported_is_one_line() -> None:
    def interrupted() -> None:
        common._excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)

    ended = forked(interrupted)
    assert (ended.status, ended.errors) == (130, "interrupted: nothing had begun\n")


# --- the last checkpoint comes before the last validation ----------------------------------------------


@pytest.mark.distributed
def test_killed_in_the_last_validation_nothing_is_done_again(uninterrupted: Path, tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    overrides += SETTINGS
    for result in run_distributed(signal_jobs.killed_in_validation, 2, path, overrides, 2):
        assert result == [4, 6]
    resumed = run_distributed(train, 2, path, [*overrides, "checkpoint.resume=must"])[0]
    assert resumed.get("finished"), resumed.get("error")
    run = tmp_path / "runs" / "tiny"
    assert figures(run) == figures(uninterrupted)
    again = run_distributed(train, 2, path, overrides)[0]  # finished: it reports, and writes nothing twice
    assert again["bpc"] == resumed["bpc"]
    assert figures(run) == figures(uninterrupted)
    ours, theirs = (load_file(directory / "hf" / "model.safetensors") for directory in (run, uninterrupted))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


# --- under the launchers ------------------------------------------------------------------------------


LAUNCHERS = {
    "python": ([sys.executable], 1, STOPPED),
    "torchrun": ([str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2"], 2, 1),
    "deepspeed": ([str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators=2"], 2, 1),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_under_a_launcher_saves_a_checkpoint(tmp_path: Path, name: str, number: signal.Signals) -> None:
    """SIGTERM to the process that starts the ranks; Ctrl-C and a closed terminal reach all that were started."""
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
            if number == signal.SIGTERM:
                os.kill(_launcher_of_ranks(process.pid) if name == "deepspeed" else process.pid, number)
            else:
                os.killpg(process.pid, number)
            ended = process.wait(120)
            if number == signal.SIGTERM or name == "python":  # launchers have statuses of their own for the others
                assert ended == status, (tmp_path / "output").read_text()
            deadline = time.monotonic() + 60  # some do not wait for their processes
            while "the same command continues" not in (tmp_path / "output").read_text():
                assert time.monotonic() < deadline, (tmp_path / "output").read_text()
                time.sleep(0.2)
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
