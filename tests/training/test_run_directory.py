"""Commands x what they may find where they are to write: each goes on, says that it is finished, or is refused.

What was there is compared by checksums, before and after.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2moe.config import ConfigError, load, to_dict, to_yaml
from s2moe.config.finetune import FinetuneConfig
from s2moe.config.run import RunConfig
from s2moe.config.vision import VisionRunConfig
from s2moe.finetuning import start as finetuning
from s2moe.finetuning.trainer import mark_complete
from s2moe.training import report_collapse, run, run_lock, slim_report
from s2moe.training.checkpoint import TrainingState, publish
from s2moe.training.run_directory import (
    FINETUNING,
    KINDS,
    PRETRAINING,
    RUN_FILE,
    VISION,
    claimed,
    maker_of,
    new_model,
    report_directory,
    sign,
)
from s2moe.training.run_lock import locked, locked_alone
from s2moe.training.tables import results

from .jobs import TINY, contents
from .lock_jobs import ALONE
from .vision_jobs import MIXTURE

SST2 = Path(__file__).parents[2] / "configs" / "finetune" / "sst2.yaml"
STEPS = 6
REPLACED = {RUN_FILE, "config.yaml", "curves.png", "tensorboard/events"}  # of an own start that left no checkpoint


def config_of(kind: str, directory: Path, *more: str) -> Any:
    """The settings of a run of this kind in the directory."""
    place = [f"name={directory.name}", f"output_dir={directory.parent}"]
    if kind == FINETUNING:
        return load(FinetuneConfig, SST2, ["model.checkpoint=absent", *place, *more])
    if kind == VISION:
        return load(VisionRunConfig, None, [*(f"{key}={value}" for key, value in MIXTURE.items()), *place, *more])
    (directory.parent / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return load(RunConfig, directory.parent / "tiny.yaml", ["data.dir=absent", *place, *more])


def job_of(kind: str, config: Any) -> Any:
    """What `train` knows of a run when it comes to its directory."""
    state = TrainingState(seed=config.seed, corpus="corpus", config=to_dict(config) | {"model": config.model})
    return SimpleNamespace(kind=kind, config=config, state=state)


def start(kind: str, config: Any) -> str:
    """What the run does in its directory, up to training."""
    with claimed(config.directory, kind, ALONE):
        if kind == FINETUNING:
            begun = finetuning.choose_start(config, ALONE)
            if begun.results is not None:
                return "finished"
            finetuning.take_over(config, begun, ALONE)
            return "begins" if begun.checkpoint is None else "continues"
        job = job_of(kind, config)
        chosen = run.choose_start(job, ALONE)
        if chosen.finished is not None:
            return "finished"
        run.take_over(job, chosen.checkpoint)
        return "begins" if chosen.checkpoint is None else "continues"


# --- what there may be ------------------------------------------------------------------------------------


def write(path: Path, content: str = "made by someone") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def begun(directory: Path, kind: str, *settings: str, signed: bool = True, name: str | None = None) -> Any:
    """A start of the run, before its first checkpoint."""
    config = config_of(kind, directory, *settings)
    directory.mkdir(parents=True)
    if signed:
        sign(directory, kind, name or directory.name)
    write(directory / "config.yaml", to_yaml(job_of(kind, config).state.config | {"name": name or directory.name}))
    for file in ("metrics.jsonl", "tensorboard/events", "curves.png", "notes.txt"):
        write(directory / file, "")
    return config


def checkpointed(directory: Path, kind: str, *settings: str, step: int = 2, **more: Any) -> None:
    """The same after a checkpoint."""
    config = begun(directory, kind, *settings, **more)
    if kind == FINETUNING:
        write(directory / "checkpoints" / f"checkpoint-{step}" / "model.safetensors", "weights")
        mark_complete(directory / "checkpoints" / f"checkpoint-{step}", {})
        return
    state = job_of(kind, config).state
    state.step = step
    temporary = directory / "checkpoints" / ".tmp-step"
    write(temporary / "weights.pt", "weights")
    publish(temporary, directory / "checkpoints" / f"step-{step:08d}", state, {})


def model(directory: Path, name: str = "run", step: int = STEPS) -> None:
    """An exported model."""
    write(directory / "config.json", "{}")
    write(directory / "model.safetensors", f"weights of step {step}")
    write(directory / "training.json", json.dumps({"run": name, "step": step}))


def exported(directory: Path, kind: str, *settings: str, step: int = STEPS, **more: Any) -> None:
    """A finished run without checkpoints."""
    begun(directory, kind, *settings, **more)
    finish(directory, kind, step)


def finish(directory: Path, kind: str, step: int = STEPS) -> None:
    model(directory / "hf", directory.name, step)
    if kind == VISION:
        write(directory / "evaluation.json", "{}")
    if kind == FINETUNING:
        write(directory / "results.json", json.dumps(dict.fromkeys(finetuning.RESULTS, 0)))


def finished(directory: Path, kind: str) -> None:
    checkpointed(directory, kind, step=STEPS)
    finish(directory, kind)


def checkpoints_alone(directory: Path, kind: str) -> None:
    checkpointed(directory, kind)
    for name in (RUN_FILE, "config.yaml", "metrics.jsonl", "tensorboard/events"):
        (directory / name).unlink()


def with_somebodys_model(directory: Path, kind: str) -> None:
    checkpointed(directory, kind)
    write(directory / "hf" / "model.safetensors")


def linked(directory: Path, kind: str) -> None:
    """Someone has made room on other disks."""
    directory.mkdir()
    for name in ("checkpoints", "hf"):
        (directory.parent / f"disk of {name}").mkdir()
        (directory / name).symlink_to(directory.parent / f"disk of {name}")


OTHER = {PRETRAINING: FINETUNING, VISION: PRETRAINING, FINETUNING: PRETRAINING}  # kinds
UNKNOWN = "and nothing says that a run made it"
FOUND: dict[str, tuple[Callable[[Path, str], Any], str]] = {  # and what becomes of a run that finds it
    "nothing": (lambda d, kind: None, "begins"),
    "an empty directory": (lambda d, kind: d.mkdir(), "begins"),
    "files of other names": (lambda d, kind: write(d / "notes" / "thesis.txt"), "begins"),
    "links to empty directories": (linked, "begins"),
    "its own start without a checkpoint": (begun, "begins"),
    "the same, older than run.json": (lambda d, kind: begun(d, kind, signed=False), "begins"),
    "its own, unfinished": (checkpointed, "continues"),
    "the same, older than run.json ": (lambda d, kind: checkpointed(d, kind, signed=False), "continues"),
    "the same, copied from a run of another name": (lambda d, kind: checkpointed(d, kind, name="first"), "continues"),
    "its checkpoints alone": (checkpoints_alone, "continues"),
    "its own, finished": (finished, "continues"),
    "its own, finished, without checkpoints": (exported, "finished"),
    "the same, older than run.json  ": (lambda d, kind: exported(d, kind, signed=False), "finished"),
    "the same of other settings": (lambda d, kind: exported(d, kind, "seed=2"), "seed was 2, is 1"),
    "the same of fewer steps": (lambda d, kind: exported(d, kind, step=4), "is of step 4, and no checkpoint is left"),
    "its own of other settings": (lambda d, kind: checkpointed(d, kind, "seed=2"), "seed was 2, is 1"),
    "its own, and somebody's hf/": (with_somebodys_model, "hf exists and is not an exported model"),
    "another kind's start": (lambda d, kind: begun(d, OTHER[kind]), "is of a"),
    "another kind's, unfinished": (lambda d, kind: checkpointed(d, OTHER[kind]), "is of a"),
    "another kind's, finished": (lambda d, kind: finished(d, OTHER[kind]), "is of a"),
    "another kind's, older than run.json": (lambda d, kind: exported(d, OTHER[kind], signed=False), "is of a"),
    "another run's start": (lambda d, kind: begun(d, kind, name="first"), "'first', and has no checkpoint"),
    "another run's, finished": (lambda d, kind: exported(d, kind, name="first"), "'first', and has no checkpoint"),
    "a model": (lambda d, kind: model(d), "holds a model"),
    "somebody's hf/": (lambda d, kind: write(d / "hf" / "model.safetensors"), UNKNOWN),
    "somebody's checkpoints/": (lambda d, kind: write(d / "checkpoints" / "mine" / "weights.pt"), UNKNOWN),
    "somebody's config.yaml": (lambda d, kind: write(d / "config.yaml", "name: mine\nlr: 1\n"), UNKNOWN),
    "somebody's link": (lambda d, kind: (d.mkdir(), (d / "hf").symlink_to("nowhere")), UNKNOWN),
    "a file": (lambda d, kind: write(d), "is a file"),
    "a link to nothing": (lambda d, kind: d.symlink_to("nowhere"), "is a file"),
}
FINETUNED = {  # differently: finished are those with results
    "its checkpoints alone": UNKNOWN,
    "its own, finished": "finished",
    "the same of fewer steps": "finished",
    "another run's, finished": "finished",
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs(tmp_path: Path, kind: str) -> None:
    for number, (found, (make, becomes)) in enumerate(FOUND.items()):
        expected = FINETUNED.get(found, becomes) if kind == FINETUNING else becomes
        directory = tmp_path / str(number) / "run"
        directory.parent.mkdir()
        config = config_of(kind, directory)
        make(directory, kind)
        before = contents(directory)
        try:
            outcome = start(kind, config)
        except ConfigError as error:
            outcome = str(error)
            assert "\n" not in outcome
            assert "another name=..." in outcome, (found, outcome)
        assert outcome == expected or expected in outcome, (kind, found, outcome)
        went_on = outcome in ("begins", "continues")
        kept = {name for name in before if not went_on or name.removeprefix("run/") not in REPLACED}
        after = contents(directory)
        assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}, (kind, found)
        if went_on:
            maker = maker_of(directory)
            assert maker is not None
            assert (maker.kind, maker.name) == (kind, "run")
            assert (directory / RUN_FILE).is_file()
        else:
            assert after == before, (kind, found)


@contextlib.contextmanager
def read_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stands for a file system that cannot be written, which root is not kept from by permissions."""
    opened = os.open

    def refusing(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(run_lock.os, "open", refusing)
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [begun, checkpointed, finished, exported])
def test_runs_that_cannot_have_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, make: Callable[[Path, str], Any]
) -> None:
    config = config_of(kind, tmp_path / "run")
    make(tmp_path / "run", kind)
    before = contents(tmp_path)
    with read_only(monkeypatch), pytest.raises(ConfigError, match=r"cannot write the directory .*Read-only"):
        start(kind, config)
    with locked(tmp_path / "run", ALONE), pytest.raises(ConfigError, match="in use by another start of this run"):
        start(kind, config)
    with locked(tmp_path / "run", ALONE), pytest.raises(ConfigError, match="is of a"):
        start(OTHER[kind], config_of(OTHER[kind], tmp_path / "run"))
    assert {k: v for k, v in contents(tmp_path).items() if "tiny" not in k} == {
        k: v for k, v in before.items() if "tiny" not in k
    }


# --- exports and reports ----------------------------------------------------------------------------------

Command = Callable[[Path], AbstractContextManager[None]]
COMMANDS: dict[str, Command] = {
    "export": lambda target: new_model(target, "run", target.parent / "source" / "run", STEPS),
    "upcycle": new_model,
    "collapse": lambda target: report_directory(target, report_collapse.REPORT_FILE, report_collapse.PICTURES),
    "slim": lambda target: report_directory(target, *slim_report.FILES),
    "table": lambda target: report_directory(target, *results.FILES),
}
MODELS, REPORTS, ALL = {"export", "upcycle"}, {"collapse", "slim", "table"}, set(COMMANDS)
CSV = "row,seed,error\nvanilla,1,0.1\n"
TARGETS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {  # and the commands that go on
    "nothing": (lambda t: None, ALL),
    "an empty directory": (lambda t: t.mkdir(), ALL),
    "an earlier export": (lambda t: model(t, step=2), {"export", *REPORTS}),
    "a later export": (lambda t: model(t, step=STEPS + 1), REPORTS),
    "another run's export": (lambda t: model(t, name="first"), REPORTS),
    "a run": (lambda t: finished(t, PRETRAINING), REPORTS),
    "an earlier collapse report": (lambda t: write(t / "collapse.json", "{}"), REPORTS),
    "an earlier slim report": (lambda t: write(t / "slim.json", "{}"), REPORTS),
    "an earlier table": (lambda t: (write(t / "results.csv", CSV), write(t / "table.md")), REPORTS),
    "a table in the making": (lambda t: (write(t / "runs.log"), write(t / "runs" / "log")), REPORTS),
    "files of other names": (lambda t: write(t / "thesis.txt"), REPORTS),
    "somebody's collapse.json": (lambda t: write(t / "collapse.json"), {"slim", "table"}),
    "somebody's load.png": (lambda t: write(t / "load.png"), {"slim", "table"}),
    "somebody's slim.md": (lambda t: write(t / "slim.md"), {"collapse", "table"}),
    "somebody's results.csv": (lambda t: write(t / "results.csv", "a,b\n1,2\n"), {"collapse", "slim"}),
    "somebody's table.md": (lambda t: write(t / "table.md"), {"collapse", "slim"}),
    "a file": (write, set()),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_exports_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def outcome(target: Path) -> str:
        try:
            with COMMANDS[command](target):
                return "goes on"
        except ConfigError as error:
            return str(error)

    for number, (found, (make, going_on)) in enumerate(TARGETS.items()):
        target = tmp_path / str(number) / "target"
        target.parent.mkdir()
        make(target)
        before = contents(target.parent)
        answer = outcome(target)
        assert (answer == "goes on") == (command in going_on), (command, found, answer)
        assert answer == "goes on" or "give a" in answer, (command, found, answer)
        assert contents(target.parent) == before, (command, found)
    target = tmp_path / "target"
    with COMMANDS[command](target):
        assert "is being written" in outcome(target)
    with read_only(monkeypatch):
        assert "cannot write" in outcome(target)
    assert not target.exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_model_of_another_run_of_the_same_name_is_not_replaced(tmp_path: Path) -> None:
    """Each run's hf/ is its own; a copy of a run under another name has the hf/ that it came with."""
    for folder, kind in (("a", PRETRAINING), ("b", FINETUNING)):
        (tmp_path / folder).mkdir()
        exported(tmp_path / folder / "run", kind, name="first")
    own, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    with pytest.raises(ConfigError, match="holds a model of another run"), new_model(other / "hf", "run", own, STEPS):
        pass
    with new_model(own / "hf", "second", own, STEPS), locked_alone(own, "in use", "wait"):
        pass  # a run's newest checkpoint can be exported while it goes on
