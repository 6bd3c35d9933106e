"""A run directory is that of one start at a time, and all processes of it see the same one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from s2moe.config import ConfigError
from s2moe.training import run_lock
from s2moe.training.run_lock import LOCK_FILE, locked
from tests.distributed_harness import DistributedError, run_distributed
from tests.training import jobs, lock_jobs, vision_jobs

from .lock_jobs import ALONE, hold

ELSEWHERE = "does not see what rank 0 on {host} writes to {folder}/machine0/runs/run, in {folder}/machine1/runs/run: "


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """Another process that holds the lock of `tmp_path`/run."""
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "run",))
    process.start()
    deadline = time.monotonic() + 30
    while run_lock._read(tmp_path / "run" / LOCK_FILE) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.join()


def live_on(started: Event) -> None:
    started.set()
    time.sleep(120)


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_second_start_ends_at_once_and_says_who_holds_the_directory(tmp_path: Path, holder: BaseProcess) -> None:
    said = rf"run is in use by another start of this run: process {holder.pid} on {socket.gethostname()}, since 20"
    with pytest.raises(ConfigError, match=said) as refused, locked(tmp_path / "run", ALONE):
        pytest.fail("two starts in one directory")
    assert f"If its machine is gone, remove {tmp_path / 'run' / LOCK_FILE}" in str(refused.value)
    assert holder.is_alive()


def test_the_lock_of_a_killed_start_goes_with_it(tmp_path: Path, holder: BaseProcess) -> None:
    kill(holder)
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with locked(tmp_path / "run", ALONE):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_child_does_not_hold_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    with locked(tmp_path / "run", ALONE):
        context = multiprocessing.get_context("fork")
        started = context.Event()
        child = context.Process(target=live_on, args=(started,))
        child.start()
        assert started.wait(30)
        os.rename(tmp_path / "run" / LOCK_FILE, tmp_path / "run" / "moved")  # so that the file is not removed
    os.rename(tmp_path / "run" / "moved", tmp_path / "run" / LOCK_FILE)
    try:
        with locked(tmp_path / "run", ALONE):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with locked(tmp_path / "run", ALONE):
        pass
    assert f"warning: the file system of {tmp_path / 'run' / LOCK_FILE} has no locks" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()  # nothing came of it


@pytest.mark.parametrize(("job", "restart", "taken"), [("7", "1", True), ("7", "0", False), ("8", "1", False)])
def test_a_requeued_job_takes_what_a_dead_machine_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: str, taken: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with locked(tmp_path / "run", ALONE):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        if taken:
            with locked(tmp_path / "run", ALONE):
                assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["restart"] == 1
        else:
            with pytest.raises(ConfigError, match="job 7, since"), locked(tmp_path / "run", ALONE):
                pass


# --- whole runs ----------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_second_run_leaves_the_first_alone(tmp_path: Path, holder: BaseProcess) -> None:
    half = tmp_path / "run" / "checkpoints" / ".tmp-step-2" / "weights.pt"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"being written")
    path, overrides = jobs.tiny_run(tmp_path)
    overrides += [f"output_dir={tmp_path}", "name=run"]
    said = f"process {holder.pid} on "
    assert said in run_distributed(jobs.train, 1, path, overrides)[0]["error"]
    with pytest.raises(DistributedError, match=said):
        run_distributed(vision_jobs.run, 1, str(tmp_path), {})
    assert half.read_bytes() == b"being written"
    assert not (tmp_path / "run" / "config.yaml").exists()
    kill(holder)
    assert run_distributed(jobs.train, 1, path, [*overrides, "training.steps=2"])[0]["finished"]
    assert not (tmp_path / "run" / LOCK_FILE).exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_see_different_directories_end_before_the_first_step(tmp_path: Path) -> None:
    corpus = str(jobs.tiny_corpus(tmp_path / "data"))
    settings = {"training.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 1, "evaluation.every": 0}
    said = ELSEWHERE.format(host=socket.gethostname(), folder=tmp_path)
    for _ in range(2):  # nothing to continue from, and then a checkpoint
        answers = run_distributed(lock_jobs.run_apart, 2, corpus, str(tmp_path), True, settings)
        assert answers[0] == answers[1]
        assert answers[0]["error"].startswith("rank 1 on ")
        assert said in answers[0]["error"]
        together = run_distributed(lock_jobs.run_apart, 2, corpus, str(tmp_path), False, settings)
        assert together == [{"step": 4}, {"step": 4}]


@pytest.mark.distributed
def test_a_checkpoint_whose_files_one_process_does_not_see_is_not_published(tmp_path: Path) -> None:
    answers = run_distributed(lock_jobs.save_twice, 2, str(tmp_path))
    assert answers[0] == answers[1]
    host, folder = socket.gethostname(), tmp_path / "machine0" / "checkpoints"
    assert answers[0] == (
        f"cannot write the checkpoint step-2: rank 0 on {host} does not find in {folder / '.tmp-step-2'}: rank_1.pt of "
        f"rank 1 on {host}: give an output_dir on a file system that all processes see; the checkpoint of step 1 is "
        "intact: the same command continues from there"
    )
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
