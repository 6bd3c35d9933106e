"""Where a fine-tuning run starts in its directory: anew, from a checkpoint, or not at all, as it is finished."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from s2moe.config import ConfigError, load, to_dict, to_yaml
from s2moe.config.finetune import FinetuneConfig
from s2moe.hub.provenance import HF_DIRECTORY
from s2moe.training.agreement import together
from s2moe.training.checkpoint import remove_temporary
from s2moe.training.processes import Processes
from s2moe.training.ranks import from_first
from s2moe.training.run_directory import (
    FINETUNING,
    SETTINGS_FILE,
    present,
    require_leavings,
    require_own_model,
    sign,
)

from .trainer import COMPLETE, newest_checkpoint

RESULTS_FILE = "results.json"
RESULTS = ("task", "test_accuracy", "validation_accuracy", "best_step", "steps", "texts", "notes")  # of a finished run
FREE = ("output_dir", "name", "checkpoint", "logging")  # sections that a run may change when it continues


@dataclass(frozen=True)
class Start:
    """`checkpoint` to continue from; or `results`, of a run that is finished; or neither, to begin."""

    checkpoint: str | None = None
    results: dict[str, Any] | None = None


def choose_start(config: FinetuneConfig, processes: Processes) -> Start:
    """Look at the run's directory, where nothing is changed by it. Collective.

    Raises:
        ConfigError: `checkpoint.resume` forbids or demands a checkpoint, it is of a run with other settings, or
            beginning would replace what this run did not make.
    """
    with together(processes):
        start = look(config) if processes.is_main else Start()
    return from_first(start)


def look(config: FinetuneConfig) -> Start:
    """``choose_start`` in one process."""
    directory = config.directory
    newest = newest_checkpoint(directory / "checkpoints")
    results = read_results(directory)
    if results is not None and newest is not None and not present(directory, (HF_DIRECTORY,)):
        results = None  # the model is written again
    found = newest if results is None else str(directory / RESULTS_FILE)
    if found is None:
        if config.checkpoint.resume == "must":
            raise ConfigError(
                f"checkpoint.resume=must, but there is no complete checkpoint in {directory / 'checkpoints'}"
            )
        require_leavings(directory, FINETUNING, config.name)
        return Start()
    if config.checkpoint.resume == "never":
        raise ConfigError(f"checkpoint.resume=never, but {found} exists: choose another name=..., or resume=auto")
    if changes := changed_since(config):
        raise ConfigError(f"cannot continue from {found}: {'; '.join(changes)}. Choose another name=...")
    if results is not None:
        return Start(results=results)
    require_own_model(directory, config.name)
    return Start(checkpoint=newest)


def read_results(directory: Path) -> dict[str, Any] | None:
    """The results of a finished run, which are written when everything else is there; None where it is not finished."""
    try:
        found = json.loads((directory / RESULTS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and all(name in found for name in RESULTS) else None


def changed_since(config: FinetuneConfig) -> list[str]:
    """For the user: in what decides its results the run differs from what its directory was begun with."""
    old, new = to_dict(load(FinetuneConfig, config.directory / SETTINGS_FILE, written=True)), to_dict(config)
    changed = [
        f"{section}.{key} was {old[section][key]}, is {value}"
        for section, values in new.items()
        if isinstance(values, dict) and section not in FREE
        for key, value in values.items()
        if old[section][key] != value
    ]
    return changed + ([f"seed was {old['seed']}, is {new['seed']}"] if old["seed"] != new["seed"] else [])


def take_over(config: FinetuneConfig, start: Start, processes: Processes) -> None:
    """Say whose the directory is, and remove what an earlier start left unfinished. Collective."""
    with together(processes):
        if processes.is_main:
            _take_over(config, start)


def _take_over(config: FinetuneConfig, start: Start) -> None:
    directory = config.directory
    folder = directory / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    sign(directory, FINETUNING, config.name)
    remove_temporary(folder)
    for path in folder.iterdir():
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) and not (path / COMPLETE).is_file():
            shutil.rmtree(path)
    if start.checkpoint is None:  # nothing of an earlier attempt counts
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
    (directory / RESULTS_FILE).unlink(missing_ok=True)
    (directory / SETTINGS_FILE).write_text(to_yaml(config), encoding="utf-8")
