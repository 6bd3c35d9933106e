"""One small checkpoint of each kind, written and then read with traps in it, in the one rank of a test."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin

from s2moe import S2MoEForSequenceClassification
from s2moe.config import ConfigError
from s2moe.finetuning.accelerated import load_state, prepare, save_state
from s2moe.finetuning.loading import load_pretrained
from s2moe.finetuning.optimizer import parameter_groups
from s2moe.finetuning.trainer import cpu_processes, deepspeed_settings
from s2moe.training import checkpoint as checkpoints
from s2moe.training import reshape
from s2moe.training.checkpoint import TrainingState, open_checkpoint
from s2moe.training.weights import checkpoint_state
from tests.distributed.reshape_jobs import Trainer
from tests.finetuning.trainer_jobs import CLASSES, Texts, arguments, pretrained, trainer

from .evil import readings

Told = dict[str, str]  # by the file with the trap: what its reader said


def told(of: Iterable[tuple[str, BaseException | None]]) -> Told:
    """By file. What is no ConfigError would reach the user as a traceback."""
    found: Told = {}
    for name, error in of:
        if error is None:
            found[name] = "nothing"
        else:
            found[name] = f"{'error' if isinstance(error, ConfigError) else type(error).__name__}: {error}"
    return found


def pretraining(folder: str, stage: int) -> dict[str, Told]:
    """Resuming, converting, exporting; and resuming what was converted."""
    checkpoints.sync = lambda path: None  # each manifest anew would wait for the disk
    made = Trainer(1, stage, {"method": "smoe"})
    made.steps(0, 1)
    state = TrainingState(step=1, zero_stage=stage)
    path = checkpoints.save(made.engine, Path(folder, "checkpoints"), state, keep=1)
    targets = (Path(folder, f"universal-{number}") for number in itertools.count())

    def sign(directory: Path = path, universal: bool = False) -> None:
        (directory / checkpoints.MANIFEST).unlink(missing_ok=True)
        checkpoints._write_manifest(directory, state, {}, universal)

    readers: dict[str, Callable[[], object]] = {
        "resume": lambda: checkpoints.restore(made.engine, open_checkpoint(path), state),
        "convert": lambda: reshape.convert(open_checkpoint(path), next(targets)),
        "weights": lambda: checkpoint_state(open_checkpoint(path)),
    }
    found = {name: told(readings(path, read, sign)) for name, read in readers.items()}
    universal = Path(folder, "converted")
    reshape.convert(open_checkpoint(path), universal)
    resume = lambda: checkpoints.restore(made.engine, open_checkpoint(universal), state)  # noqa: E731
    found["universal"] = told(readings(universal, resume, lambda: sign(universal, True)))
    return found


def trainers(folder: str, stage: int) -> dict[str, Told]:
    """Resuming transformers' Trainer, and its best model; stage 0: without DeepSpeed."""
    source, output = pretrained(Path(folder, "source"), num_experts=2), Path(folder, "output")

    def make() -> Any:
        AcceleratorState._reset_state()
        gc.collect()
        settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 50}
        if stage:
            settings |= {"deepspeed": deepspeed_settings(stage), **cpu_processes()}
        else:
            settings["use_cpu"] = True
        return trainer(output, source, args=arguments(output, **settings))

    made = make()
    made.train()
    path = output / "checkpoint-1"
    made.state.best_model_checkpoint = str(path)
    return {
        "best": told(readings(path, made._load_best_model)),
        "resume": told(readings(path, lambda: make().train(resume_from_checkpoint=str(path)))),
    }


class Counter:
    """What a loop of one's own registers."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 3, "mean": torch.zeros(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["seen"] == 3


def accelerated(folder: str, stage: int) -> dict[str, Told]:
    """A loop of one's own; stage 0: without DeepSpeed."""
    source = pretrained(Path(folder, "source"), num_experts=2)
    if stage:
        cpu_processes()
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(stage)))
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    else:
        accelerator = Accelerator(cpu=True)
    model = load_pretrained(S2MoEForSequenceClassification, source, None, {"num_labels": CLASSES})
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.05, weight_decay=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    batches = torch.utils.data.DataLoader(Texts(), batch_size=4)
    model, optimizer, batches, schedule = prepare(accelerator, model, optimizer, batches, schedule)
    accelerator.register_for_checkpointing(Counter())
    accelerator.backward(model(**next(iter(batches))).loss)
    optimizer.step()
    save_state(accelerator, model, folder, 1)
    return {"resume": told(readings(Path(folder, "state-1"), lambda: load_state(accelerator, model, folder)))}
