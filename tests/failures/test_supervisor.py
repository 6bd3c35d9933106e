"""Processes are started again when one is lost, with fewer when one keeps failing, and not when it would not help."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import supervise as supervise_launcher
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.training.elastic import Shape, shape_for
from s2moe.training.supervisor import Supervisor

# A process of a run: notes its attempt, then does what the lines of its rank say, one an attempt.
PROCESS = """
import json, os, signal, sys, time
rank, folder = os.environ["RANK"], sys.argv[1]
file = os.path.join(folder, "attempts-" + rank)
with open(file, "a") as attempts:
    attempts.write(json.dumps([os.environ["WORLD_SIZE"], os.environ.get("CUDA_VISIBLE_DEVICES"), sys.argv[2:]]) + "\\n")
number = len(open(file).readlines())
plan = json.loads(open(os.path.join(folder, "plan.json")).read()).get(rank, [])
exec(plan[min(number, len(plan)) - 1] if plan else "")
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
STOPPED = "os.kill(os.getpid(), signal.SIGSTOP)"
WAITING = "time.sleep(60)"
LOST = "time.sleep(0.3); sys.exit(4)"


def supervise(folder: Path, plan: dict[str, list[str]], processes: int = 2, **options: Any) -> int:
    (folder / "plan.json").write_text(json.dumps(plan))
    return Supervisor(
        [sys.executable, "-c", PROCESS, str(folder)],
        processes,
        options.pop("shape_for", lambda left: Shape(min(left, processes), 1, 2) if left else None),
        options.pop("devices", lambda: None),
        lambda: "step 6",
        grace_seconds=1.0,
        pause_seconds=options.pop("pause_seconds", 0.2),
        **options,
    ).run()


def attempts(folder: Path, rank: int = 0) -> list[Any]:
    return [json.loads(line) for line in (folder / f"attempts-{rank}").read_text().splitlines()]


def test_processes_that_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(tmp_path, {}) == 0
    assert [attempts(tmp_path, rank) for rank in (0, 1)] == [[["2", os.environ.get("CUDA_VISIBLE_DEVICES"), []]]] * 2
    assert capsys.readouterr().err == ""


def test_a_killed_process_is_named_and_all_start_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(tmp_path, {"0": [LOST, ""], "1": [KILLED, ""]}) == 0
    assert len(attempts(tmp_path, 0)) == len(attempts(tmp_path, 1)) == 2
    message = "supervise: rank 1 was killed by SIGKILL; rank 0 ended with status 4. Restart 1 of 3, from step 6"
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (2, "a setting or the data is wrong, see above"),
        (3, "the run itself failed, see above"),
        (75, "a signal asked it to stop, and it saved a checkpoint"),
    ],
)
def test_what_starting_again_does_not_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, reason: str
) -> None:
    assert supervise(tmp_path, {"0": [WAITING], "1": [f"sys.exit({status})"]}) == status
    assert len(attempts(tmp_path)) == 1
    assert f"rank 1 ended with status {status}: {reason}. Not started again" in capsys.readouterr().err


def test_a_place_that_fails_twice_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices = lambda: ["4", "5", "7"]  # noqa: E731
    plan = {"0": [LOST, LOST, ""], "1": [KILLED, KILLED, ""], "2": [LOST]}
    shape = lambda left: Shape(3 if left >= 3 else 2, 1, 2)  # noqa: E731
    assert supervise(tmp_path, plan, 3, devices=devices, shape_for=shape) == 0
    settings = ["training.expert_parallel=1", "training.micro_batch=2"]
    assert attempts(tmp_path) == [["3", "4,5,7", []], ["3", "4,5,7", []], ["2", "4,7", settings]]
    assert "place 5 failed twice in a row: going on without it" in capsys.readouterr().err


def test_a_stopped_process_is_the_one_to_blame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(tmp_path, {"0": [LOST, ""], "1": [STOPPED, ""]}) == 0
    assert "rank 0 ended with status 4; rank 1 did not end and was killed. Restart 1" in capsys.readouterr().err


def test_giving_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(tmp_path, {"0": ["sys.exit(1)"]}, 1, max_restarts=2) == 4
    assert len(attempts(tmp_path)) == 3
    assert "Giving up after 2 restarts within 60 minutes; the same command continues from step 6" in (
        capsys.readouterr().err
    )


def test_restarts_of_long_ago_do_not_count(tmp_path: Path) -> None:
    plan = {"0": ["sys.exit(1)"] * 3 + [""]}
    assert supervise(tmp_path, plan, 1, max_restarts=1, window_minutes=0.1 / 60) == 0
    assert len(attempts(tmp_path)) == 4


def test_no_shape_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(tmp_path, {}, shape_for=lambda left: None) == 4
    assert "no shape of the run fits the 2 places that are left" in capsys.readouterr().err


def start(folder: Path, plan: dict[str, list[str]], pause: float = 0.2) -> subprocess.Popen[str]:
    """A supervisor in a process of its own, whose first attempt has begun."""
    code = f"""
from pathlib import Path
from tests.failures.test_supervisor import supervise
raise SystemExit(supervise(Path({str(folder)!r}), {plan!r}, pause_seconds={pause}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((folder / f"pid-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def pids(folder: Path) -> list[int]:
    return [int((folder / f"pid-{rank}").read_text()) for rank in (0, 1)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def tells_its_pid(folder: Path, then: str) -> str:
    name = str(folder / "pid-")
    return f"n = {name!r} + rank; open(n + '~', 'w').write(str(os.getpid())); os.rename(n + '~', n); {then}"


def test_signals_reach_the_processes_and_end_the_run(tmp_path: Path) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"
    supervisor = start(tmp_path, {str(rank): [f"{handler}; {tells_its_pid(tmp_path, WAITING)}"] for rank in (0, 1)})
    supervisor.send_signal(signal.SIGTERM)
    _, printed = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 75  # they saved and ended well
    assert "a signal asked it to stop, and it saved a checkpoint. Not started again" in printed


@pytest.mark.parametrize("number", [pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_that_comes_too_early_for_the_processes_ends_the_run_too(
    tmp_path: Path, number: signal.Signals
) -> None:
    supervisor = start(tmp_path, {str(rank): [tells_its_pid(tmp_path, WAITING)] for rank in (0, 1)})
    supervisor.send_signal(number)
    _, printed = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 75  # they could not save, but the newest checkpoint is what it was
    assert f"asked to stop by {number.name}: rank " in printed
    assert f"was killed by {number.name}" in printed
    assert printed.strip().endswith("Not started again; the same command continues from step 6")
    assert [len(attempts(tmp_path, rank)) for rank in (0, 1)] == [1, 1]


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGUSR1, 75),
        pytest.param(signal.SIGUSR2, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_pause_before_a_restart_ends_the_run(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    plan = {str(rank): [tells_its_pid(tmp_path, "sys.exit(4)")] for rank in (0, 1)}
    supervisor = start(tmp_path, plan, pause=30.0)
    assert supervisor.stderr is not None
    assert "Restart 1 of 3" in supervisor.stderr.readline()
    supervisor.send_signal(number)
    _, printed = supervisor.communicate(timeout=30)
    assert supervisor.returncode == status
    assert f"asked to stop by {number.name}: nothing was running" in printed
    assert len(attempts(tmp_path)) == 1


def to_this_thread(number: signal.Signals) -> None:
    """As if this process had no other thread, which a supervisor has not and the tests' own process may have."""
    signal.pthread_kill(threading.get_ident(), number)


def test_a_signal_before_anything_was_started_starts_nothing(tmp_path: Path) -> None:
    def devices() -> None:
        to_this_thread(signal.SIGUSR1)

    assert supervise(tmp_path, {}, devices=devices) == 75
    assert not (tmp_path / "attempts-0").exists()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    to_this_thread(signal.SIGTERM)  # as during the launcher's imports
    assert supervise(tmp_path, {}) == 75
    assert not (tmp_path / "attempts-0").exists()


def test_a_signal_while_processes_are_started_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        process = real(*arguments, **options)
        if options["env"]["RANK"] == "0":
            to_this_thread(signal.SIGUSR1)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert supervise(tmp_path, {"0": [WAITING], "1": [WAITING]}) == 75


def test_a_failure_is_told_before_the_stop_that_it_came_with(tmp_path: Path) -> None:
    assert supervise(tmp_path, {"0": ["sys.exit(75)"], "1": ["sys.exit(3)"]}) == 3


@pytest.mark.parametrize(
    ("visible", "works", "found"),
    [
        ("4,5,7", {"4", "5", "7"}, ["4", "5", "7"]),
        ("4,5,7", {"4", "7"}, ["4", "7"]),
        ("4,5,7", {"5", "7"}, ["5", "7"]),
        ("GPU-a,GPU-b", {"GPU-b"}, ["GPU-b"]),
        ("", set(), []),
        (None, {"0", "1"}, ["0", "1"]),
    ],
)
def test_gpus_that_are_left(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, works: set[str], found: list[str]
) -> None:
    def count(values: list[str | None]) -> list[int]:
        """CUDA sees no GPU behind one that it does not find."""
        lists = [sorted(works) if value is None else value.split(",") for value in values]
        return [len(list(itertools.takewhile(works.__contains__, names))) for names in lists]

    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(supervise_launcher, "count", count)
    assert supervise_launcher.gpus() == found


def test_gpus_are_counted_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; v = os.environ['CUDA_VISIBLE_DEVICES']; sys.exit(1) if v == '5' else print('x', v)"
    monkeypatch.setattr(supervise_launcher, "COUNT", code)
    assert supervise_launcher.count(["2", "5", "1"]) == [2, 0, 1]


def test_processes_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    supervisor = start(tmp_path, {str(rank): [tells_its_pid(tmp_path, WAITING)] for rank in (0, 1)})
    supervisor.kill()
    supervisor.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def config(batch: int, degree: int, experts: int = 16, micro: str = "null") -> RunConfig:
    settings = ["name=x", "data.dir=x", "training.steps=1", "training.sequence_length=8"]
    settings += [f"training.global_batch={batch}", f"training.expert_parallel={degree}"]
    settings += [f"training.micro_batch={micro}", f"model.moe.num_experts={experts}"]
    return load(RunConfig, None, settings)


@pytest.mark.parametrize(
    ("batch", "degree", "micro", "started", "left", "shape"),
    [
        (64, 2, "null", 8, 8, Shape(8, 2, 8)),
        (64, 2, "null", 8, 7, Shape(4, 2, 8)),  # 6 and 7 do not divide the batch
        (48, 2, "null", 8, 7, Shape(6, 2, 4)),  # 8 sequences each, but no process had more than 6 at once
        (64, 8, "null", 8, 7, Shape(4, 4, 8)),  # fewer hold more experts each, but not more than they must
        (64, 4, "2", 4, 3, Shape(2, 2, 2)),
        (64, 1, "null", 4, 3, Shape(2, 1, 16)),
        (6, 1, "null", 3, 2, Shape(2, 1, 1)),
        (7, 1, "null", 7, 6, Shape(1, 1, 1)),
    ],
)
def test_shapes_for_what_is_left(batch: int, degree: int, micro: str, started: int, left: int, shape: Shape) -> None:
    found = config(batch, degree, micro=micro)
    assert shape_for(found, started, left) == shape
    from s2moe.config.run import check_world

    settings = [f"training.global_batch={batch}", *shape.settings]
    base = ["name=x", "data.dir=x", "training.steps=1", "training.sequence_length=8"]
    check_world(load(RunConfig, None, [*base, *settings]), shape.processes)


def test_no_place_no_shape() -> None:
    assert shape_for(config(8, 2), 2, 0) is None
