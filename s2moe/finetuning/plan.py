"""What a fine-tuning run would do, as `launcher/finetune.py --dry-run` says it. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from s2moe.config.finetune import FinetuneConfig
from s2moe.data.classification import TASKS
from s2moe.training.run_directory import FINETUNING, finished_text, require_kind

from .loading import changed_config, class_for
from .opening import Pretrained, read_texts
from .start import look
from .trainer import step_of


def plan(config: FinetuneConfig, world_size: int) -> str:
    """Texts, model, steps and directory of a run on so many processes.

    Raises:
        ConfigError, CorpusError: what would stop the run: a setting, the texts, the weights, what its directory holds.
    """
    micro_batch = config.micro_batch(world_size)
    pretrained = Pretrained.open(config)
    rows = {"weights": pretrained.weights.description}
    if missing := missing_files(config):
        rows["texts"] = f"{config.data.task}: a run downloads {', '.join(missing)} to {downloads(config)} first"
        classes: tuple[str, ...] = ("", "")
    else:
        data = read_texts(config)
        classes, sizes = data.classes, data.sizes()
        rows["texts"] = f"{config.data.task}: {', '.join(f'{count:,} {name}' for name, count in sizes.items())}"
        rows |= {f"  {number}": note for number, note in enumerate(data.notes, 1)}
        pretrained.encoded(config, data)["train"][0]
    parameters = count_parameters(pretrained, config, classes)
    rows["model"] = f"{parameters:,} parameters with a head for {'2' if missing else len(classes)} classes"
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    batch = f"batches of {config.training.batch} texts: {processes} x micro-batches of {micro_batch}"
    if missing:
        rows["training"] = f"{config.training.epochs} epochs in {batch}"
    else:
        steps = steps_of_epoch(sizes, config, micro_batch, world_size)
        epochs = config.training.epochs
        rows["training"] = f"{epochs * steps:,} steps, {steps:,} in each of {epochs} epochs, in {batch}"
    rows["directory"] = directory_text(config)
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in rows.items())


def downloads(config: FinetuneConfig) -> Path:
    """Where the task's files are kept."""
    return Path(config.data.downloads) / config.data.task


def missing_files(config: FinetuneConfig) -> list[str]:
    """The task's files that are still to be downloaded."""
    if config.data.source is not None:
        return []
    return [name for name in TASKS[config.data.task].urls if not (downloads(config) / name).exists()]


def steps_of_epoch(sizes: Mapping[str, int], config: FinetuneConfig, micro_batch: int, world_size: int) -> int:
    """Optimizer steps of one pass over train, whose last batch may be smaller."""
    batches = math.ceil(sizes["train"] / (micro_batch * world_size))
    return math.ceil(batches / (config.training.batch // (micro_batch * world_size)))


def count_parameters(pretrained: Pretrained, config: FinetuneConfig, classes: tuple[str, ...]) -> int:
    """Of the classifier, which is built without storage."""
    changed = changed_config(pretrained.weights, pretrained.changes(config, classes))
    with torch.device("meta"):
        model = class_for(AutoModelForSequenceClassification, changed, pretrained.weights)(changed)
    return sum(parameter.numel() for parameter in model.parameters())


def directory_text(config: FinetuneConfig) -> str:
    """Where the run writes, and where it would start."""
    require_kind(config.directory, FINETUNING)
    start = look(config)
    if start.results is not None:
        return finished_text(config.directory, f"after {start.results['steps']:,} steps")
    if start.checkpoint is not None:
        return f"{config.directory}, continuing at step {step_of(start.checkpoint):,}"
    return str(config.directory)
