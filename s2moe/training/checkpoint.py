"""Checkpoints that are complete or absent.

A checkpoint is written to `checkpoints/.tmp-step-N`; when every process has written its part and the
files are on disk, process 0 lists them with sizes and checksums in `manifest.json` and renames the directory
to `checkpoints/step-00000N`. There is no pointer to the latest one: it is the complete checkpoint
with the highest step. So a process killed at any moment leaves at most a temporary directory, which
the next run removes.

The files themselves are DeepSpeed's. It continues a checkpoint written at another expert-parallel
degree silently wrong, therefore `restore` compares the shapes first; reshape.py converts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s2moe.config.options import ConfigError
from s2moe.moe.config import resolve_moe
from s2moe.parallel import deepspeed_compat

from .publication import TEMPORARY, require_seen, require_success
from .quiet import no_prints
from .ranks import barrier, gather, rank, world
from .writing import BackgroundWriter, Writer, digest, sync

MANIFEST = "manifest.json"
_COMPLETE = re.compile(r"step-(\d{8,})")
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")  # converters that DeepSpeed adds, blind to spread experts
REMOVED = f"{TEMPORARY}removed-"  # a checkpoint that is being deleted
UNIVERSAL = "universal-"  # a checkpoint's universal form beside it, while a run changes its shape


@dataclass
class TrainingState:
    """What a checkpoint knows beside weights and optimizer state.

    Everything random is a function of (seed, step, micro-batch) and the position in the data is a
    number of samples, so this is all that resuming needs.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, over all sessions
    seed: int = 0
    world_size: int = 1
    expert_parallel: int = 1
    zero_stage: int = 1
    precision: str = "fp32"
    corpus: str = ""  # fingerprint of the training split
    tokenizer: str = ""  # its fingerprint; empty in checkpoints that are older than this field
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint directory and its state.

    Attributes:
        universal: its files do not depend on the shape of the run that wrote it.
        sizes, digests: bytes and SHA-256 of its files; no digests in checkpoints that are older than them.
    """

    path: Path
    state: TrainingState
    universal: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] | None = None


@dataclass
class Pending:
    """A checkpoint whose files are being written. `saved` is the step of the newest complete one."""

    temporary: Path
    final: Path
    state: TrainingState
    keep: int
    writer: Writer
    saved: int | None = None

    def publish(self) -> Path:
        """Wait for the files of all processes and make a checkpoint of them. Collective.

        Raises:
            TrainingError: on every process, when one of them could not write, or process 0 does not see what another
                one has written. Older checkpoints stay as they were.
        """
        self.writer.wait()
        written = require_success(self.writer.failures, self.writer.digests, self.temporary, self.saved)
        require_seen(self.temporary, written, self.saved)
        failures = []
        try:
            if rank() == 0:
                publish(self.temporary, self.final, self.state, {name: file.digest for name, file in written.items()})
                for checkpoint in list_complete(self.final.parent)[: -self.keep]:
                    remove(checkpoint.path)
                remove_universal(self.final.parent)  # the run has gone on in its new shape
        except OSError as error:
            failures.append(str(error))
        require_success(failures, {}, self.temporary, self.saved)
        return self.final


def save(engine: Any, directory: Path, state: TrainingState, keep: int, saved: int | None = None) -> Path:
    """Write a checkpoint of all processes and drop the oldest beyond `keep`. Collective.

    Returns the directory of the new checkpoint, which exists only if it is complete.

    Args:
        saved: step of the newest complete checkpoint so far, for messages.

    Raises:
        TrainingError: on every process, when one of them cannot write. Older checkpoints stay as they were.
    """
    return begin(engine, directory, state, keep, Writer(), saved).publish()


def begin(
    engine: Any, directory: Path, state: TrainingState, keep: int, writer: Writer, saved: int | None = None
) -> Pending:
    """Give the files of a checkpoint to `writer`. Collective."""
    temporary = directory / f"{TEMPORARY}step-{state.step}"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    with writer.of(engine):
        engine.save_checkpoint(str(directory), tag=temporary.name, client_state=asdict(state), save_latest=False)
    return Pending(temporary, directory / f"step-{state.step:08d}", replace(state), keep, writer, saved)


class Saver:
    """Saves the checkpoints of a run, behind training where `asynchronous` says so: one at a time.

    A checkpoint in writing is published at the first step boundary at which all processes have their files on the
    disk. Until then there is only its temporary directory.

    Attributes:
        saved: step of the newest complete checkpoint, None where there is none.
    """

    def __init__(self, engine: Any, directory: Path, keep: int, asynchronous: bool, saved: int | None = None) -> None:
        self.saved = saved
        self._engine, self._directory, self._keep, self._asynchronous = engine, directory, keep, asynchronous
        self._pending: Pending | None = None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, or begin to. Collective.

        Raises:
            TrainingError: as `save`, also for the checkpoint before this one.
        """
        self.settle(wait=True)
        writer = BackgroundWriter() if self._asynchronous else Writer()
        self._pending = begin(self._engine, self._directory, state, self._keep, writer, self.saved)
        self.settle(wait=not self._asynchronous)

    def settle(self, wait: bool = False) -> None:
        """Publish the checkpoint in writing if all processes have written, or `wait` until then. Collective.

        To be called between steps, and with `wait` at the end.

        Raises:
            TrainingError: as `save`.
        """
        if self._pending is None or not (wait or self._all_done(self._pending.writer)):
            return
        pending, self._pending = self._pending, None
        pending.publish()
        self.saved = pending.state.step

    def _all_done(self, writer: Writer) -> bool:
        if not dist.is_initialized():
            return writer.done()
        missing = torch.tensor([float(not writer.done())], device=self._engine.device)
        dist.all_reduce(missing)
        return missing.item() == 0


def restore(engine: Any, checkpoint: Checkpoint, current: TrainingState) -> TrainingState:
    """Load a checkpoint into the engine and return its state. Collective.

    Options of the optimizer and clipping stay those that the engine was built with.

    Raises:
        ConfigError: if it is of another run, or was written in another shape and is not universal; or if a file of it
            is not what a checkpoint's file may be.
    """
    require_same(checkpoint, current)
    if not checkpoint.universal and shape_of(checkpoint.state) != shape_of(current):
        raise ConfigError(f"{checkpoint.path} was written with {shape_text(checkpoint.state)}: it needs converting")
    load = deepspeed_compat.load_universal if checkpoint.universal else deepspeed_compat.load_checkpoint
    try:
        with no_prints():
            load(engine, checkpoint.path)
    except deepspeed_compat.CheckpointFileError as error:
        raise ConfigError(str(error)) from error
    return checkpoint.state


def shape_of(state: TrainingState) -> tuple[int, int, int]:
    """What decides how a checkpoint's files are cut: processes, expert-parallel degree, ZeRO stage."""
    return state.world_size, state.expert_parallel, state.zero_stage


def shape_text(state: TrainingState) -> str:
    """That for the user."""
    return (
        f"{state.world_size} processes, training.expert_parallel={state.expert_parallel}, "
        f"training.zero_stage={state.zero_stage}"
    )


def _architecture(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model, those of its layers by dotted names, as this version resolves them.

    An earlier version did not know all of them. Those of a similarity loss that is off say nothing.
    """
    moe = model.get("moe")
    if not isinstance(moe, dict):
        return model
    with contextlib.suppress(ValueError):  # of a version to come
        moe = asdict(resolve_moe(moe))
    flat = _dotted(moe, "moe.")
    if not flat.get("moe.regularisers.cka_loss"):
        flat = {name: value for name, value in flat.items() if not name.startswith("moe.regularisers.cka_")}
    return {name: value for name, value in model.items() if name != "moe"} | flat


def _dotted(tree: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _dotted(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


def require_same(checkpoint: Checkpoint, current: TrainingState) -> None:
    """Raise ConfigError naming every setting in which the run differs so that it cannot continue exactly.

    Its shape may differ: see reshape.py.
    """
    saved = checkpoint.state
    keys = {
        "precision": "training.precision",
        "seed": "seed",
        "corpus": "the training data",
    }
    changes = [
        f"{label} was {getattr(saved, name)}, is {getattr(current, name)}"
        for name, label in keys.items()
        if getattr(saved, name) != getattr(current, name)
    ]
    before, now = (_architecture(state.config.get("model", {})) for state in (saved, current))
    changes += [
        f"model.{name} was {before.get(name)}, is {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    # Another freeze would let the optimizer's state move what is frozen. Older checkpoints do not know it.
    for name, default in (("sequence_length", None), ("global_batch", None), ("freeze", "none")):
        before, now = (state.config.get("training", {}).get(name, default) for state in (saved, current))
        if before != now:
            changes.append(f"training.{name} was {before}, is {now}")
    # Runs on texts have AdamW alone, and do not say so.
    before, now = (state.config.get("optimizer", {}).get("name", "adamw") for state in (saved, current))
    if before != now:
        changes.append(f"optimizer.name was {before}, is {now}")
    if changes:
        raise ConfigError(
            f"cannot continue from {checkpoint.path}: {'; '.join(changes)}. "
            "Start it as it was written, or start a new run with another name=..."
        )


def find_latest(
    directory: Path, warn: Callable[[str], None] = lambda message: None, without: Collection[Path] = ()
) -> Checkpoint | None:
    """The complete checkpoint with the highest step, not one `without`; damaged newer ones are named through `warn`."""
    for path in sorted(set(_candidates(directory)) - set(without), reverse=True):
        try:
            return open_checkpoint(path)
        except ConfigError as error:
            warn(f"{error}; falling back to the checkpoint before it")
    return None


def is_empty(directory: Path) -> bool:
    """Whether there is no checkpoint, not even a damaged one."""
    return not _candidates(directory)


def list_complete(directory: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first."""
    found = []
    for path in sorted(_candidates(directory)):
        try:
            found.append(open_checkpoint(path))
        except ConfigError:
            continue
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint's manifest.

    Raises:
        ConfigError: if a file is missing or has another length than was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sizes, state = dict(manifest["files"]), TrainingState(**manifest["state"])
        has_checksums = bool({"sha256", "manifest"} & manifest.keys())
        intact = not has_checksums or manifest.pop("manifest") == _own_digest(manifest)
    except FileNotFoundError:
        raise ConfigError(f"the checkpoint {path} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the checkpoint {path} is damaged: its {MANIFEST} cannot be read ({error})") from error
    if not intact:
        raise ConfigError(f"the checkpoint {path} is damaged: its {MANIFEST} has not the content that was written")
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise ConfigError(f"the checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise ConfigError(
                f"the checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes instead of {size}"
            )
    return Checkpoint(path, state, bool(manifest.get("universal")), sizes, manifest.get("sha256"))


def verify(checkpoint: Checkpoint, progress: Callable[[], None] = lambda: None) -> None:
    """Compare every file with its checksum, each on one process. Collective. `progress` is called after each file.

    Raises:
        ConfigError: on every process, naming the first file that has not the content that was written.
    """
    problems = []
    if checkpoint.digests is not None:
        # The largest files first, dealt out like cards: processes read about the same.
        names = sorted(checkpoint.digests, key=lambda name: (-checkpoint.sizes[name], name))
        for name in names[rank() :: world()]:
            try:
                found = digest(checkpoint.path / name)
            except OSError as error:
                problems.append(f"{name} cannot be read ({error.strerror})")
            else:
                if found != checkpoint.digests[name]:
                    problems.append(f"{name} has not the content that was written (SHA-256)")
            progress()
    every = [problem for of_process in gather(problems) for problem in of_process]
    if every:
        raise ConfigError(f"the checkpoint {checkpoint.path} is damaged: {min(every)}")


def remove_temporary(directory: Path) -> None:
    """Remove what an earlier process left half-written or half-deleted. For process 0, before training."""
    for path in directory.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_universal(directory: Path, but: Checkpoint | None = None) -> None:
    """Remove the universal forms of checkpoints, except that of one. For one process."""
    for path in directory.glob(f"{UNIVERSAL}*"):
        if but is None or path.name != f"{UNIVERSAL}{but.path.name}":
            remove(path)


def _candidates(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if _COMPLETE.fullmatch(path.name)]


def publish(
    temporary: Path, final: Path, state: TrainingState, digests: dict[str, str], universal: bool = False
) -> None:
    """Turn the written files into a checkpoint. In one process; `digests` of the files as far as they are known."""
    _write_manifest(temporary, state, digests, universal)
    if final.exists():  # a damaged one
        remove(final)
    os.rename(temporary, final)
    sync(final.parent)
    for script in _SCRIPTS:
        (final.parent / script).unlink(missing_ok=True)


def _write_manifest(path: Path, state: TrainingState, digests: dict[str, str], universal: bool = False) -> None:
    """List the directory's files. Those of which `digests` does not know the checksum are read for it."""
    sizes = {}
    for file in _files(path):
        name = str(file.relative_to(path))
        sizes[name] = file.stat().st_size
        if name not in digests:
            sync(file)
            digests[name] = digest(file)
    manifest: dict[str, Any] = {
        "files": sizes,
        "sha256": {name: digests[name] for name in sizes},  # of nothing that is not there: see publication.py
        "state": asdict(state),
    }
    if universal:
        manifest["universal"] = True
    text = json.dumps({**manifest, "manifest": _own_digest(manifest)}, indent=1)
    (path / MANIFEST).write_text(text, encoding="utf-8")
    sync(path / MANIFEST)
    sync(path)


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Delete a directory so that, killed half-way, it does not look like a checkpoint."""
    doomed = path.with_name(f"{REMOVED}{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_half_removed(directory: Path, prefix: str) -> None:
    """Delete the rest of the checkpoints whose names begin with `prefix`, whose deletion was cut short."""
    for path in directory.glob(f"{REMOVED}{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)
