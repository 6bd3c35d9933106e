"""A checkpoint is complete or absent, whatever interrupts writing it."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2moe.config import ConfigError
from s2moe.moe.config import resolve_moe
from s2moe.moe.methods import METHODS
from s2moe.parallel.deepspeed_compat import CheckpointFileError, load_file
from s2moe.training import checkpoint, publication, writing
from s2moe.training.checkpoint import (
    Saver,
    TrainingState,
    find_latest,
    open_checkpoint,
    remove_temporary,
    require_same,
    save,
    verify,
)
from s2moe.training.errors import TrainingError


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the code under test runs after it."""


class FullDisk:
    """What cannot be written."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


class FakeEngine:
    """Writes two files like DeepSpeed, one of them in a sub-directory; can be killed between them."""

    def __init__(self, killed: bool = False, full: bool = False) -> None:
        self.killed, self.full = killed, full
        self.checkpoint_engine: Any = SimpleNamespace()  # what DeepSpeed's engine writes through

    def save_checkpoint(self, directory: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert not save_latest
        path = Path(directory, tag, "part")
        path.mkdir(parents=True)
        (path / "a.pt").write_bytes(b"a" * 10)
        if self.killed:
            raise Killed
        content = FullDisk() if self.full else b"b" * client_state["step"]
        self.checkpoint_engine.save(content, str(path.parent / "b.pt"))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_save_and_keep_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(FakeEngine(), tmp_path, TrainingState(step=step, samples=8 * step), keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.state == TrainingState(step=3, samples=24)


def test_killed_while_writing_leaves_the_old_one(tmp_path: Path) -> None:
    save(FakeEngine(), tmp_path, TrainingState(step=1), keep=1)
    with pytest.raises(Killed):
        save(FakeEngine(killed=True), tmp_path, TrainingState(step=2), keep=1)
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.state.step == 1
    remove_temporary(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("where", ["os.rename", "_write_manifest", "remove"])
def test_killed_while_publishing_leaves_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save(FakeEngine(), tmp_path, TrainingState(step=1), keep=1)

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        target = checkpoint.os if where.startswith("os.") else checkpoint
        patch.setattr(target, where.removeprefix("os."), kill)
        with pytest.raises(Killed):
            save(FakeEngine(), tmp_path, TrainingState(step=2), keep=1)
    remove_temporary(tmp_path)
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.state.step == (2 if where == "remove" else 1)  # the old one goes only after the new one is there
    save(FakeEngine(), tmp_path, TrainingState(step=3), keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_killed_while_deleting_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(FakeEngine(), tmp_path, TrainingState(step=1), keep=1)
    real = shutil.rmtree

    def kill(path: Path, **arguments: Any) -> None:
        if path.exists():
            (path / "b.pt").unlink(missing_ok=True)
            raise Killed
        real(path, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            save(FakeEngine(), tmp_path, TrainingState(step=2), keep=1)
    warnings: list[str] = []
    latest = find_latest(tmp_path, warnings.append)
    assert latest is not None
    assert (latest.state.step, warnings) == (2, [])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / "b.pt").unlink(), "b.pt is missing"),
        (lambda path: (path / "b.pt").write_bytes(b"b"), "b.pt has 1 bytes instead of "),
        (lambda path: (path / "manifest.json").unlink(), "incomplete: it has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "its manifest.json cannot be read"),
    ],
)
def test_damaged_newest_is_refused_aloud_and_the_one_before_is_used(tmp_path: Path, damage: Any, problem: str) -> None:
    for step in (1, 2):
        save(FakeEngine(), tmp_path, TrainingState(step=step), keep=2)
    damage(tmp_path / "step-00000002")
    with pytest.raises(ConfigError, match=problem):
        open_checkpoint(tmp_path / "step-00000002")
    warnings: list[str] = []
    latest = find_latest(tmp_path, warnings.append)
    assert latest is not None
    assert latest.state.step == 1
    assert len(warnings) == 1
    assert problem in warnings[0]
    assert "step-00000002" in warnings[0]
    save(FakeEngine(), tmp_path, TrainingState(step=2), keep=2)  # the repeated step replaces the damaged one
    assert open_checkpoint(tmp_path / "step-00000002").state.step == 2


def test_a_full_disk_is_one_error_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(FakeEngine(), tmp_path, TrainingState(step=1), keep=1)
    message = r"cannot write the checkpoint step-2: .*b\.pt: No space left on device: make room; "
    with pytest.raises(TrainingError, match=f"{message}the checkpoint of step 1 is intact: the same command continues"):
        save(FakeEngine(full=True), tmp_path, TrainingState(step=2), keep=1, saved=1)
    with pytest.raises(TrainingError, match=f"{message}there is no checkpoint yet: the same command begins anew"):
        save(FakeEngine(full=True), tmp_path / "new", TrainingState(step=2), keep=1)
    (tmp_path / "new").rmdir()
    assert names(tmp_path) == ["step-00000001"]

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", fail)
    with pytest.raises(TrainingError, match="No space left"):
        save(FakeEngine(), tmp_path, TrainingState(step=2), keep=1)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("lag", [3, 10**9])
def test_files_that_show_late_are_waited_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    save(FakeEngine(), tmp_path, TrainingState(step=1), keep=1)
    size, looks = publication._size, 0

    def late(path: Path) -> int | None:
        nonlocal looks
        looks += 1
        found = size(path)
        return found if looks > lag or found is None else found - 1

    monkeypatch.setattr(publication, "_size", late)
    monkeypatch.setattr(publication, "SEEN_SECONDS", 60.0 if lag == 3 else 0.3)
    if lag == 3:
        verify(open_checkpoint(save(FakeEngine(), tmp_path, TrainingState(step=2), keep=1)))
        return
    with pytest.raises(TrainingError, match=r"rank 0 on .* does not find in .*\.tmp-step-2: b\.pt of rank 0 on "):
        save(FakeEngine(), tmp_path, TrainingState(step=2), keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_no_directory_no_checkpoint(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "absent") is None


def state(**changes: Any) -> TrainingState:
    config = {"model": {"hidden_size": 32}, "training": {"sequence_length": 64, "steps": 5}}
    return TrainingState(**{"corpus": "tiny:1", "config": config, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "training.precision was fp32, is bf16"),
        ({"world_size": 4, "seed": 9}, "step-00000001: seed was 0, is 9"),  # another shape is no obstacle
        ({"corpus": "tiny:2"}, "the training data was tiny:1, is tiny:2"),
        (
            {"config": {"model": {"hidden_size": 48}, "training": {"sequence_length": 64}}},
            "model.hidden_size was 32, is 48",
        ),
        (
            {"config": {"model": {"hidden_size": 32}, "training": {"sequence_length": 32}}},
            "training.sequence_length was 64, is 32",
        ),
    ],
)
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(FakeEngine(), tmp_path, state(step=1), keep=1)
    saved = find_latest(tmp_path)
    assert saved is not None
    require_same(saved, state())
    with pytest.raises(ConfigError, match=message):
        require_same(saved, state(**changes))


def of_an_earlier_version(method: str) -> dict[str, Any]:
    """The layers' options as they were resolved before SimSMoE's loss had forms."""
    moe = asdict(resolve_moe({"method": method}))
    del moe["regularisers"]["cka_form"]
    moe["regularisers"]["cka_shared"] = 4
    return moe


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_an_earlier_version_goes_on(method: str, tmp_path: Path) -> None:
    config = {"model": {"moe": of_an_earlier_version(method)}, "training": {}}
    save(FakeEngine(), tmp_path, state(step=1, config=config), keep=1)
    saved = find_latest(tmp_path)
    assert saved is not None
    now = asdict(resolve_moe({"method": method}))
    if method == "simsmoe":  # whose loss is another one now
        with pytest.raises(ConfigError, match=r"model\.moe\.regularisers\.cka_form was batch_mean, is published"):
            require_same(saved, state(config={"model": {"moe": now}, "training": {}}))
        now["regularisers"] |= {"cka_form": "batch_mean", "cka_shared": 4}
    require_same(saved, state(config={"model": {"moe": now}, "training": {}}))


def test_a_default_that_has_changed_is_named(tmp_path: Path) -> None:
    moe = of_an_earlier_version("loss_free")
    moe["router"]["renormalise"] = True
    save(FakeEngine(), tmp_path, state(step=1, config={"model": {"moe": moe}}), keep=1)
    saved = find_latest(tmp_path)
    assert saved is not None
    now = {"model": {"moe": asdict(resolve_moe({"method": "loss_free"}))}}
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.renormalise was True, is False\. "):
        require_same(saved, state(config=now))


def test_more_steps_are_allowed(tmp_path: Path) -> None:
    save(FakeEngine(), tmp_path, state(step=1), keep=1)
    saved = find_latest(tmp_path)
    assert saved is not None
    require_same(saved, state(config={"model": {"hidden_size": 32}, "training": {"sequence_length": 64, "steps": 9}}))


# --- checksums -----------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["b.pt", "part/a.pt"])
def test_a_changed_bit_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    path = save(FakeEngine(), tmp_path, TrainingState(step=7), keep=1)
    verify(open_checkpoint(path))
    flip(path / name, 3)
    saved = open_checkpoint(path)  # the size is right
    seen: list[None] = []
    with pytest.raises(ConfigError, match=f"step-00000007 is damaged: {name} has not the content that was written"):
        verify(saved, lambda: seen.append(None))
    assert len(seen) == 2


def test_a_changed_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    path = save(FakeEngine(), tmp_path, state(step=1), keep=1)
    manifest = path / "manifest.json"
    intact = manifest.read_bytes()
    for place in range(0, len(intact), 3):
        flip(manifest, place)
        with pytest.raises(ConfigError, match="damaged"):
            open_checkpoint(path)
        manifest.write_bytes(intact)


def test_a_checkpoint_older_than_checksums_is_taken(tmp_path: Path) -> None:
    path = save(FakeEngine(), tmp_path, state(step=1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({key: manifest[key] for key in ("files", "state")}))
    old = open_checkpoint(path)
    assert (old.state, old.digests) == (state(step=1), None)
    verify(old)


# --- files that would run code -------------------------------------------------------------------------


class Trap:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_file_that_would_run_code_is_not_loaded(tmp_path: Path, kind: str) -> None:
    file, sprung = tmp_path / "a.pt", tmp_path / "sprung"
    content = OrderedDict(module={"weight": torch.ones(3)}, trap=Trap(sprung))
    if kind == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointFileError, match=r"a.pt is not loaded, as it is not a plain checkpoint file"):
        load_file(file)
    assert not sprung.exists()


# --- behind training -----------------------------------------------------------------------------------


class SlowDisk:
    """Files are on the disk when it is let go; then it may be full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: bool = False) -> None:
        self.go, self.full = threading.Event(), full
        monkeypatch.setattr(writing, "sync", self.sync)

    def sync(self, path: Path) -> None:
        assert self.go.wait(60)
        if self.full:
            raise OSError(28, "No space left on device")


def test_behind_training_a_checkpoint_appears_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, saver = SlowDisk(monkeypatch), Saver(FakeEngine(), tmp_path, keep=1, asynchronous=True)
    current = TrainingState(step=1)
    saver.save(current)
    current.step = 2  # training goes on
    saver.settle()
    assert find_latest(tmp_path) is None
    disk.go.set()
    saver.settle(wait=True)
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.state.step == 1
    verify(latest)
    assert torch.load(latest.path / "b.pt") == b"b"
    saver.save(current)
    saver.settle(wait=True)
    assert names(tmp_path) == ["step-00000002"]


def test_behind_training_one_checkpoint_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, saver = SlowDisk(monkeypatch), Saver(FakeEngine(), tmp_path, keep=2, asynchronous=True)
    saver.save(TrainingState(step=1))
    threading.Timer(0.3, disk.go.set).start()
    saver.save(TrainingState(step=2))  # waits for the first
    assert names(tmp_path)[-1] == "step-00000001"
    saver.settle(wait=True)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_behind_training_a_full_disk_ends_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(FakeEngine(), tmp_path, TrainingState(step=1), keep=1)
    disk, saver = SlowDisk(monkeypatch, full=True), Saver(FakeEngine(), tmp_path, keep=1, asynchronous=True)
    saver.save(TrainingState(step=2))
    saver.settle()
    disk.go.set()
    with pytest.raises(TrainingError, match=r"cannot write the checkpoint step-2: .*No space left"):
        saver.settle(wait=True)
    assert names(tmp_path) == ["step-00000001"]
    saver.settle(wait=True)  # which is over
