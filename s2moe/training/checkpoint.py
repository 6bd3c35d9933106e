"""Checkpoints that are complete or absent.

A checkpoint is written to `checkpoints/.tmp-step-N`; when every process has written its part and the
files are on disk, process 0 lists them with their sizes in `manifest.json` and renames the directory
to `checkpoints/step-00000N`. There is no pointer to the latest one: it is the complete checkpoint
with the highest step. So a process killed at any moment leaves at most a temporary directory, which
the next run removes.

The files themselves are DeepSpeed's. It continues a checkpoint written at another expert-parallel
degree silently wrong, therefore `restore` compares the degrees in the manifest first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from s2moe.config.options import ConfigError

from .errors import TrainingError
from .quiet import no_prints

MANIFEST = "manifest.json"
_COMPLETE = re.compile(r"step-(\d{8,})")
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")  # converters that DeepSpeed adds, blind to spread experts
_TEMPORARY = ".tmp-"
_OPTIONS = ("betas", "eps", "weight_decay")  # of the optimizer, per parameter group


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
    """A complete checkpoint directory and its state."""

    path: Path
    state: TrainingState


def save(engine: Any, directory: Path, state: TrainingState, keep: int) -> Path:
    """Write a checkpoint of all processes and drop the oldest beyond `keep`. Collective.

    Returns the directory of the new checkpoint, which exists only if it is complete.

    Raises:
        TrainingError: on every process, when one of them cannot write. Older checkpoints stay as they were.
    """
    temporary = directory / f"{_TEMPORARY}step-{state.step}"
    final = directory / f"step-{state.step:08d}"
    if _rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    _barrier()
    with _noting_failures(engine) as failures:
        engine.save_checkpoint(str(directory), tag=temporary.name, client_state=asdict(state), save_latest=False)
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            for file in _files(temporary):
                _sync(file)
    except OSError as error:
        failures.append(str(error))
    _require_success(failures, temporary)
    try:
        if _rank() == 0:
            _publish(temporary, final, state)
            for checkpoint in list_complete(directory)[:-keep]:
                _remove(checkpoint.path)
    except OSError as error:
        failures.append(str(error))
    _require_success(failures, temporary)
    return final


def restore(engine: Any, checkpoint: Checkpoint, current: TrainingState) -> TrainingState:
    """Load a checkpoint into the engine and return its state. Collective.

    The optimizer's options stay those that the engine was built with; DeepSpeed would bring back the saved ones.

    Raises:
        ConfigError: if it was written at another degree of parallelism, precision, seed or corpus.
    """
    require_same(checkpoint, current)
    configured = [{name: group[name] for name in _OPTIONS} for group in engine.optimizer.param_groups]
    with no_prints():
        loaded, _ = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint {checkpoint.path}")
    for group, options in zip(engine.optimizer.param_groups, configured, strict=True):
        group.update(options)
    return checkpoint.state


def require_same(checkpoint: Checkpoint, current: TrainingState) -> None:
    """Raise ConfigError naming every setting in which the run differs so that it cannot continue exactly."""
    saved = checkpoint.state
    keys = {
        "world_size": "the number of processes",
        "expert_parallel": "training.expert_parallel",
        "zero_stage": "training.zero_stage",
        "precision": "training.precision",
        "seed": "seed",
        "corpus": "the training data",
    }
    changes = [
        f"{label} was {getattr(saved, name)}, is {getattr(current, name)}"
        for name, label in keys.items()
        if getattr(saved, name) != getattr(current, name)
    ]
    before, now = saved.config.get("model", {}), current.config.get("model", {})
    changes += [
        f"model.{name} was {before.get(name)}, is {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    before, now = (state.config.get("training", {}).get("sequence_length") for state in (saved, current))
    if before != now:
        changes.append(f"training.sequence_length was {before}, is {now}")
    if changes:
        raise ConfigError(
            f"cannot continue from {checkpoint.path}: {'; '.join(changes)}. "
            "Start it as it was written, or start a new run with another name=..."
        )


def find_latest(directory: Path, warn: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The complete checkpoint with the highest step; damaged newer ones are named through `warn`."""
    for path in sorted(_candidates(directory), reverse=True):
        try:
            return open_checkpoint(path)
        except ConfigError as error:
            warn(f"{error}; falling back to the checkpoint before it")
    return None


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
        sizes, state = manifest["files"], TrainingState(**manifest["state"])
    except FileNotFoundError:
        raise ConfigError(f"the checkpoint {path} is incomplete: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the checkpoint {path} is damaged: its {MANIFEST} cannot be read ({error})") from error
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise ConfigError(f"the checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise ConfigError(
                f"the checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes instead of {size}"
            )
    return Checkpoint(path, state)


def remove_temporary(directory: Path) -> None:
    """Remove what an earlier process left half-written or half-deleted. For process 0, before training."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _candidates(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if _COMPLETE.fullmatch(path.name)]


@contextlib.contextmanager
def _noting_failures(engine: Any) -> Iterator[list[str]]:
    """Within it, a file that the engine cannot write is noted, not raised: processes wait for one another to save.

    What was written of the file goes, which on a full disk makes room for the others to go on.
    """
    failures: list[str] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError
            failures.append(f"{path}: {error}")
            with contextlib.suppress(OSError):
                os.unlink(path)

    writer.save = save
    try:
        yield failures
    except OSError as error:
        failures.append(str(error))
    finally:
        del writer.save  # the class' own comes back


def _require_success(failures: list[str], temporary: Path) -> None:
    """Raise TrainingError on every process if one of them failed, after removing what was written. Collective."""
    found = [failures]
    if dist.is_initialized():
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, failures)
    first = next((failure for of_process in found for failure in of_process), None)
    if first is None:
        return
    if _rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    raise TrainingError(
        f"cannot write the checkpoint {temporary.name.removeprefix(_TEMPORARY)}: {first}; the last complete "
        "checkpoint is intact: make room, and the same command continues from there"
    )


def _publish(temporary: Path, final: Path, state: TrainingState) -> None:
    """Turn the written files into a checkpoint."""
    _write_manifest(temporary, state)
    if final.exists():  # an incomplete one of this step
        _remove(final)
    os.rename(temporary, final)
    _sync(final.parent)
    for script in _SCRIPTS:
        (final.parent / script).unlink(missing_ok=True)


def _write_manifest(path: Path, state: TrainingState) -> None:
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}
    with open(path / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"files": sizes, "state": asdict(state)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(path)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    """Delete a directory so that, killed half-way, it does not look like a checkpoint."""
    doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
