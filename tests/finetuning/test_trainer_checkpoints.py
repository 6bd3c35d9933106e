"""Checkpoints of S2MoETrainer: what is left when it dies at a bad moment, which ones stay, stopping at any step."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from s2moe.finetuning import run, trainer
from s2moe.finetuning.run import StopCallback
from s2moe.finetuning.trainer import COMPLETE, S2MoETrainer, newest_checkpoint
from s2moe.training.processes import Processes

from . import trainer_jobs
from .trainer_jobs import logged, pretrained

EVERY_SECOND = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
EPOCHS = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}
STEPS_AN_EPOCH = 4


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("s2moe"), dropout=0.1, method="s2moe")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> S2MoETrainer:
    """Four steps, which nothing interrupts."""
    made = trainer_jobs.trainer(tmp_path_factory.mktemp("whole"), source, **EVERY_SECOND)
    made.train()
    return made


def dying(call: Callable[..., Any], at: int, before: Callable[..., None] = lambda *_, **__: None) -> Callable[..., Any]:
    """`call`, in whose place the process is killed the `at`-th time, after doing `before`."""
    calls = 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            before(*args, **kwargs)
            raise Killed
        return call(*args, **kwargs)

    return replaced


def half_deleted(path: Path, **_: Any) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (Path(path) / name).unlink()


MOMENTS: dict[str, tuple[Any, str, int, Callable[..., None], int]] = {  # and the step that is continued from
    "half of a checkpoint is written": (Trainer, "_save_optimizer_and_scheduler", 2, lambda *_: None, 2),
    "all but the mark is written": (trainer, "mark_complete", 2, lambda *_: None, 2),
    "an older one is half deleted": (shutil, "rmtree", 1, half_deleted, 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_continues_from_a_complete_checkpoint(
    tmp_path: Path, source: Path, whole: S2MoETrainer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    owner, name, at, before, step = MOMENTS[moment]
    killed = trainer_jobs.trainer(tmp_path, source, **EVERY_SECOND)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying(getattr(owner, name), at, before))
        with pytest.raises(Killed):
            killed.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
    again = trainer_jobs.trainer(tmp_path, source, **EVERY_SECOND)
    again.train(resume_from_checkpoint=True)
    assert logged(again, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-4"]


def test_a_checkpoint_that_is_being_overwritten_is_not_complete(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_jobs.trainer(tmp_path, source, max_steps=2, **EVERY_SECOND).train()
    assert newest_checkpoint(tmp_path) is not None
    again = trainer_jobs.trainer(tmp_path, source, max_steps=2, **EVERY_SECOND)
    monkeypatch.setattr(S2MoETrainer, "save_model", dying(S2MoETrainer.save_model, 1))
    with pytest.raises(Killed):
        again.train()
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("limit", "left"), [(1, {2, 8}), (2, {2, 6, 8})])
def test_the_newest_are_kept_and_the_best_one_besides(tmp_path: Path, source: Path, limit: int, left: set[int]) -> None:
    by_steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings = {**EPOCHS, **by_steps, "save_total_limit": limit, "metric_for_best_model": "worse_and_worse"}
    worse = itertools.count()
    extras = {"compute_metrics": lambda _: {"worse_and_worse": next(worse)}}
    made = trainer_jobs.trainer(tmp_path, source, extras=extras, **settings)
    made.train()
    assert made.state.best_global_step == 2
    assert {int(path.parent.name.rpartition("-")[2]) for path in tmp_path.glob(f"*/{COMPLETE}")} == left
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("checkpoint-*"):
        path.rename(moved / path.name)
    again = trainer_jobs.trainer(moved, source, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(moved / "checkpoint-2")  # where it is now
    for one, other in zip(again.model.parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def stopped_at(step: int | None, directory: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> S2MoETrainer:
    """Two epochs of four steps, continued where a checkpoint is; asked to stop in the given step."""
    stopping = StopCallback(Processes(0, 0, 1, torch.device("cpu")))
    made = trainer_jobs.trainer(directory, source, extras={"callbacks": [stopping]}, **EPOCHS)
    asked = lambda: signal.SIGTERM if made.state.global_step == step else None  # noqa: E731
    monkeypatch.setattr(run, "stop_signal", asked)
    made.train(resume_from_checkpoint=newest_checkpoint(directory))
    assert stopping.stopped == (step is not None)
    assert made.state.global_step == (step or 2 * STEPS_AN_EPOCH)
    return made


def test_a_stop_at_any_step_changes_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle and at the end of an epoch: losses, validation, best epoch and weights."""
    whole = stopped_at(None, tmp_path / "whole", source, monkeypatch)
    validated = [event["step"] for event in whole.state.log_history if "eval_loss" in event]
    assert validated == [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH]
    for step in range(1, 2 * STEPS_AN_EPOCH + 1):
        directory = tmp_path / str(step)
        stopped_at(step, directory, source, monkeypatch)
        assert newest_checkpoint(directory) == str(directory / f"checkpoint-{step}")
        made = stopped_at(None, directory, source, monkeypatch)
        assert made.state.best_global_step == whole.state.best_global_step
        for name in ("loss", "eval_loss", "grad_norm"):
            of_both = [{e["step"]: e[name] for e in m.state.log_history if name in e} for m in (made, whole)]
            assert of_both[0] == pytest.approx(of_both[1], rel=1e-4), (step, name)
        for one, other in zip(made.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
