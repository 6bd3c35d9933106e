"""May this command use this directory? One answer for runs of every kind, exported models, reports and tables.

A run's directory says what made it: `run.json` names the kind of run and the run. Directories that are older than that
file are known by the settings in their config.yaml. A run goes on in a directory of its own, and replaces there what
an unfinished start of it left, after everything that can be checked was checked. At anything else it stops, with one
line that says what is there and what can be done, and nothing touched: what another kind of run made, another run,
somebody else's files under names that it would write, a finished run whose checkpoints are gone. Files of other names
are left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2moe.config.options import ConfigError
from s2moe.config.plain_yaml import read_yaml
from s2moe.hub.provenance import HF_DIRECTORY

from .agreement import together
from .processes import Processes
from .publication import TEMPORARY
from .run_lock import locked, locked_alone

RUN_FILE, SETTINGS_FILE, ORIGIN_FILE = "run.json", "config.yaml", "training.json"
PRETRAINING, VISION, FINETUNING = "pretraining", "vision", "finetuning"
KINDS = {PRETRAINING: "a pre-training run", VISION: "a vision run", FINETUNING: "a fine-tuning run"}
WRITTEN = (  # by a run of any kind; of somebody else's files under these names it keeps off
    *(RUN_FILE, SETTINGS_FILE, "metrics.jsonl", "tensorboard", "checkpoints", HF_DIRECTORY),
    *("curves.png", "probes", "profile", "before.json", "evaluation.json", "results.json", "report"),
)
MODEL_FILES = ("config.json", ORIGIN_FILE)  # of an exported model's directory
CHOICES = "choose another name=... or output_dir=..."


@dataclass(frozen=True)
class Maker:
    """What made a directory: a kind of run, and the run's name."""

    kind: str
    name: str

    @property
    def text(self) -> str:
        return f"{KINDS[self.kind]}, {self.name!r}"


def maker_of(directory: Path) -> Maker | None:
    """What made the directory, if a run did."""
    try:
        found = Maker(**json.loads((directory / RUN_FILE).read_bytes()))
        if found.kind in KINDS and isinstance(found.name, str):
            return found
    except (OSError, ValueError, TypeError):
        pass
    settings = read_settings(directory) or _settings_of_checkpoints(directory)
    data, model = ({**part} if isinstance(part := settings.get(key), dict) else {} for key in ("data", "model"))
    name = settings.get("name")
    if not isinstance(name, str):
        return None
    if "task" in data and "checkpoint" in model:
        return Maker(FINETUNING, name)
    if "kind" in model and "name" in data:
        return Maker(VISION, name)
    return Maker(PRETRAINING, name) if {"dir", "train"} <= data.keys() else None


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings in its config.yaml as plain values; empty where that cannot be read."""
    try:
        found = read_yaml(directory / SETTINGS_FILE)
    except (OSError, ValueError):  # ConfigError too
        return {}
    return found if isinstance(found, dict) else {}


def _settings_of_checkpoints(directory: Path) -> dict[str, Any]:
    """Those that the newest checkpoint was written with, where someone kept the checkpoints alone."""
    for manifest in sorted((directory / "checkpoints").glob("step-*/manifest.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found: dict[str, Any] = {**json.loads(manifest.read_bytes())["state"]["config"]}
            return found
    return {}


def sign(directory: Path, kind: str, name: str) -> None:
    """Write what makes the directory. For one process, which holds its lock."""
    if (maker := Maker(kind, name)) == maker_of(directory) and (directory / RUN_FILE).is_file():
        return
    write_json(directory / RUN_FILE, asdict(maker))


def write_json(path: Path, values: Mapping[str, Any], indent: int | None = None) -> None:
    """All of it, or the file as it was."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# --- runs -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(directory: Path, kind: str, processes: Processes) -> Iterator[None]:
    """Within it the directory is this run's alone; nothing in it is changed by that. Collective.

    Raises:
        ConfigError: on every process: something else is there, another start uses it, it cannot be written, or a
            process does not see it.
    """

    def check() -> None:
        with together(processes):
            if processes.is_main:
                require_kind(directory, kind)

    check()  # before the lock too: what another kind of run is at work in is no directory to wait for
    with locked(directory, processes):
        check()
        yield


def require_kind(directory: Path, kind: str) -> None:
    """Raise ConfigError unless the directory is absent, of a run of this kind, or without what a run would write."""
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise ConfigError(f"{directory} is a file, where {KINDS[kind]} needs a directory: {CHOICES}")
    maker = maker_of(directory)
    if maker is not None and maker.kind != kind:
        raise ConfigError(f"{directory} is of {maker.text}, and this is {KINDS[kind]}: {CHOICES}")
    if maker is not None:
        return
    if present(directory, MODEL_FILES):
        raise ConfigError(f"{directory} holds a model, and {KINDS[kind]} would write into it: {CHOICES}")
    if found := present(directory, WRITTEN):
        raise ConfigError(
            f"{directory} holds {', '.join(found)}, and nothing says that a run made it: {CHOICES}, or move it away"
        )


def require_leavings(directory: Path, kind: str, name: str) -> None:
    """Raise ConfigError unless what the run would replace by beginning anew is its own.

    To be asked where there is no checkpoint to continue from; a checkpoint says itself of which run it is.
    """
    maker = maker_of(directory)
    if maker is not None and maker != Maker(kind, name):
        raise ConfigError(
            f"{directory} is of {maker.text}, and has no checkpoint to continue from: {CHOICES}, or remove it"
        )
    if present(directory, (HF_DIRECTORY,)):
        raise ConfigError(f"{directory / HF_DIRECTORY} holds a model that a new start would replace: {CHOICES}")


def exported_step(model: Path) -> int | None:
    """Of which step an exported model says it is; None where there is none, or it does not say."""
    try:
        return int(json.loads((model / ORIGIN_FILE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished_text(directory: Path, how: str) -> str:
    """For the user: the run had finished before this start of it, which did nothing."""
    return (
        f"{directory} is finished, {how}: nothing was done. Choose another name=... for another run, or remove the "
        "directory to start anew"
    )


def present(directory: Path, names: Sequence[str]) -> list[str]:
    """Those of the names under which there is something: a file, or a directory with more than temporary files."""
    return [name for name in names if _holds_something(directory / name)]


def _holds_something(path: Path) -> bool:
    if not path.is_dir():  # a link to an empty directory, on another disk perhaps, holds nothing
        return path.is_symlink() or path.exists()
    return any(not part.name.startswith(TEMPORARY) for part in path.iterdir())


# --- models and reports ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_model(
    target: Path, name: str | None = None, run: Path | None = None, step: int | None = None
) -> Iterator[None]:
    """Within it a model may be written to `target`, by this command alone.

    Raises:
        ConfigError: as `require_replaceable`; or another command writes it, or it cannot be written.
    """
    require_replaceable(target, name, run, step)
    remedy = "Wait until that ends, or give another --out"
    with locked_alone(target.with_name(f"{TEMPORARY}lock-{target.name}"), f"{target} is being written", remedy):
        require_replaceable(target, name, run, step)
        yield


def require_own_model(directory: Path, name: str) -> None:
    """Raise ConfigError unless the run may write its model to its hf/ when it ends."""
    require_replaceable(directory / HF_DIRECTORY, name, directory, remedy=f"{CHOICES}, or move it away")


def require_replaceable(
    target: Path,
    name: str | None = None,
    run: Path | None = None,
    step: int | None = None,
    remedy: str = "give another --out",
) -> None:
    """Raise ConfigError unless `target` is absent, an empty directory, or an earlier export of the same run.

    Args:
        name: of the run whose weights are to be written there; None: nothing may be replaced.
        run: its directory, in which it may replace what it finds; None: it is not known.
        step: of the weights, which must not be older than those that they replace; None: they may.
        remedy: for the user.
    """
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if name is None:
        raise ConfigError(f"{target} exists: {remedy}")
    if not (target / ORIGIN_FILE).is_file():
        raise ConfigError(f"{target} exists and is not an exported model: {remedy}")
    there, before = target.resolve(), _origin_run(target)
    owner = there.parent if there.name == HF_DIRECTORY and maker_of(there.parent) is not None else None
    another = before != name if owner is None or run is None else owner != run.resolve()
    if another:
        raise ConfigError(f"{target} holds a model of another run, {before!r}: {remedy}")
    last = exported_step(target)
    if step is not None and last is not None and last > step:
        raise ConfigError(f"{target} holds the model of step {last:,}, later than {step:,}: {remedy}")


def _origin_run(model: Path) -> str | None:
    try:
        found: str | None = json.loads((model / ORIGIN_FILE).read_text(encoding="utf-8")).get("run")
        return found
    except (OSError, ValueError, AttributeError):
        return None


def is_report(path: Path) -> bool:
    """Whether a file is a JSON object, as reports of this project are."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def report_directory(
    directory: Path, mark: str, others: Sequence[str], ours: Callable[[Path], bool] = is_report
) -> Iterator[None]:
    """Within it a report may be written to the directory, by this command alone; an earlier one is replaced.

    Raises:
        ConfigError: as `require_reportable`; or another command writes there, or it cannot be written.
    """
    require_reportable(directory, mark, others, ours)
    with locked_alone(directory, f"{directory} is being written", "Wait until that ends, or give another directory"):
        yield


def require_reportable(
    directory: Path, mark: str, others: Sequence[str], ours: Callable[[Path], bool] = is_report
) -> None:
    """To be asked before the work is done whose report is to be written.

    Args:
        mark: the file by which an earlier report is known, if it is `ours`.
        others: what else the report writes.

    Raises:
        ConfigError: somebody else's files are there under these names, or the directory cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"cannot write the report to {directory}: it is a file; give a directory")
    found = present(directory, (mark, *others))
    if found and not ours(directory / mark):
        raise ConfigError(
            f"cannot write the report to {directory}: it would replace {', '.join(found)}, and nothing says that a "
            "report wrote them; give another directory, or move them away"
        )
    place = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"cannot write the report to {directory}: {place} may not be written; give another directory")
