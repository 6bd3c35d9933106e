"""A fine-tuning run from its settings to its results: open, resume, train, choose the best epoch, test, export."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers.training_args
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME

from s2moe.config import ConfigError
from s2moe.config.finetune import FinetuneConfig
from s2moe.data.encoding import collate
from s2moe.hub.card import write_card
from s2moe.moe.freezing import freeze_named
from s2moe.parallel import deepspeed_compat
from s2moe.training.agreement import together
from s2moe.training.export import HF_DIRECTORY, empty_beside, put_in_place
from s2moe.training.metrics_log import MetricsLog
from s2moe.training.processes import Processes
from s2moe.training.ranks import barrier
from s2moe.training.run_directory import FINETUNING, ORIGIN_FILE, claimed, write_json
from s2moe.training.run_log import layer_figures
from s2moe.training.signals import losing, loss, stop_signal
from s2moe.training.tensorboard import TensorBoard

from .callback import RoutingCallback
from .loading import load_pretrained
from .opening import Pretrained, load_data
from .start import RESULTS_FILE, choose_start, take_over
from .tokenizer import TheirTokenizer, save_for_auto
from .trainer import S2MoETrainer, cpu_processes, deepspeed_settings, newest_checkpoint, step_of

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
NAMES = {
    "loss": "train/loss",
    "task_loss": "train/task_loss",
    "aux_loss": "train/aux_loss",
    "learning_rate": "lr",
    "eval_loss": "val/loss",
    "eval_accuracy": "val/accuracy",
}


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to; `results` is empty when a signal stopped it first.

    `finished_before` is True when an earlier start had finished it, and this one did nothing.
    """

    directory: Path
    step: int
    results: dict[str, Any]
    finished_before: bool = False


def finetune(config: FinetuneConfig, processes: Processes) -> FinetuneResult:
    """Fine-tune, continuing from the newest complete checkpoint if there is one. Collective.

    Raises:
        ConfigError, CorpusError: a setting, the texts, the weights or what the run's directory holds do not allow the
            run, or another start of it goes on.
        TrainingError: the loss is not finite.
    """
    with together(processes):
        micro_batch = config.micro_batch(processes.world_size)
        pretrained = Pretrained.open(config)
    if not config.model.noise and not pretrained.config.moe_config().stochastic.enabled and processes.is_main:
        print("warning: without effect in this run: model.noise (the model has no noisy copies)", flush=True)
    data = load_data(config, processes)
    with together(processes):
        changes = pretrained.changes(config, data.classes)
        splits = pretrained.encoded(config, data)
    args = training_arguments(config, processes, micro_batch)
    with claimed(config.directory, FINETUNING, processes):
        start = choose_start(config, processes)
        if start.results is not None:
            return FinetuneResult(config.directory, start.results["steps"], start.results, finished_before=True)
        parallel = deepspeed_compat.expert_parallel(config.training.expert_parallel)
        torch.manual_seed(config.seed)
        model = load_pretrained(AutoModelForSequenceClassification, Path(config.model.checkpoint), parallel, changes)
        freeze_named(model, config.model.freeze)
        take_over(config, start, processes)
        routing = RoutingCallback(config.directory / "tensorboard")
        log = MetricsCallback(config.directory, routing, step_of(start.checkpoint or ""))
        stopping = StopCallback(processes)
        trainer = FinetuneTrainer(
            model=model,
            args=args,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            data_collator=collate,
            compute_metrics=accuracy,
            learning_rates=config.optimizer.factors,
            routing=routing,
            callbacks=[log, stopping],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            with losing(lambda: loss(trainer.state.global_step, _saved(config))):
                trainer.train(resume_from_checkpoint=start.checkpoint)
            step = trainer.state.global_step
            if stopping.stopped and step < trainer.state.max_steps:
                return FinetuneResult(config.directory, step, {})
            require_best(trainer)
            tested = trainer.predict(splits["test"], metric_key_prefix="test").metrics
        finally:
            log.close()
        results = {
            "task": data.name,
            "test_accuracy": tested["test_accuracy"],
            "test_loss": tested["test_loss"],
            "validation_accuracy": trainer.state.best_metric,
            "best_step": trainer.state.best_global_step,
            "steps": step,
            "texts": data.sizes(),
            "notes": data.notes,
            "method": pretrained.config.moe_config().method,
            "checkpoint": pretrained.weights.description,
            "seed": config.seed,
        }
        export(trainer, config, pretrained.tokenizer, results)
        if processes.is_main:
            write_json(config.directory / RESULTS_FILE, results, indent=1)
        barrier()  # before the lock goes
    return FinetuneResult(config.directory, step, results)


class FinetuneTrainer(S2MoETrainer):
    """Speaks of the settings of a run."""

    remedy = "a lower optimizer.lr, a longer optimizer.warmup or a smaller optimizer.clip"


def require_best(trainer: S2MoETrainer) -> None:
    """Raise ConfigError unless the trainer has loaded the checkpoint of the best epoch."""
    best, found = trainer.state.best_global_step, trainer.state.best_model_checkpoint
    if found is None or step_of(found) != best:
        raise ConfigError(
            f"the best epoch was that of step {best}, and {trainer.args.output_dir} has no complete checkpoint of it: "
            "bring it back, or choose another name=... to train anew"
        )


def _saved(config: FinetuneConfig) -> int | None:
    """The step of the newest complete checkpoint."""
    newest = newest_checkpoint(config.directory / "checkpoints")
    return None if newest is None else step_of(newest)


def training_arguments(config: FinetuneConfig, processes: Processes, micro_batch: int) -> TrainingArguments:
    """What transformers' Trainer has to know of the settings."""
    on_cpu = processes.device.type == "cpu"
    if on_cpu and config.training.precision == "fp16":
        raise ConfigError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    # transformers allows bf16 on the CPU only with use_cpu, which would leave DeepSpeed out.
    allowed = mock.patch.object(transformers.training_args, "is_torch_bf16_gpu_available", return_value=True)
    with allowed if on_cpu else contextlib.nullcontext():
        return _arguments(config, processes, micro_batch, on_cpu)


def _arguments(config: FinetuneConfig, processes: Processes, micro_batch: int, on_cpu: bool) -> TrainingArguments:
    training, optimizer = config.training, config.optimizer
    return TrainingArguments(
        output_dir=str(config.directory / "checkpoints"),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=training.batch // (micro_batch * processes.world_size),
        per_device_eval_batch_size=training.evaluation_batch,
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip,
        lr_scheduler_type=SCHEDULES[optimizer.schedule],
        warmup_steps=optimizer.warmup,
        label_smoothing_factor=training.label_smoothing,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        activation_checkpointing=training.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if training.activation_checkpointing else None,
        deepspeed=deepspeed_settings(training.zero_stage, training.precision),
        logging_steps=config.logging.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=config.checkpoint.keep,  # S2MoETrainer keeps the best one besides
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **(cpu_processes() if on_cpu else {}),
    )


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """The part of texts whose class is right."""
    return {"accuracy": float(np.mean(np.argmax(predicted.predictions, -1) == predicted.label_ids))}


def export(trainer: S2MoETrainer, config: FinetuneConfig, tokenizer: TheirTokenizer, results: dict[str, Any]) -> None:
    """Write the trainer's model, tokenizer and card to `hf/`, which is complete or as it was before. Collective."""
    target, origin = config.directory / HF_DIRECTORY, {"run": config.name, "step": results["best_step"]}
    temporary = target.with_name(f".tmp-{target.name}")
    if trainer.args.should_save:
        temporary = empty_beside(target)
    trainer.save_model(str(temporary), _internal_call=True)
    if trainer.args.should_save:
        (temporary / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, with paths of this machine
        save_for_auto(tokenizer, temporary, config.data.input_length, config.data.keep)
        write_card(temporary, trainer.model.config, origin, config.directory, tokenizer.kind, results)
        write_json(temporary / ORIGIN_FILE, origin)
        put_in_place(temporary, target)
    if dist.is_initialized():
        dist.barrier()


class MetricsCallback(TrainerCallback):
    """Figures under this project's names, in metrics.jsonl, TensorBoard and on the console. Process 0 writes."""

    def __init__(self, directory: Path, routing: RoutingCallback, step: int) -> None:
        self._directory, self._routing, self._step = directory, routing, step
        self._metrics: MetricsLog | None = None
        self._board: TensorBoard | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._metrics = MetricsLog(self._directory / "metrics.jsonl", self._step)
            self._board = TensorBoard(self._directory / "tensorboard", self._step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        kinds = ("loss", "eval_loss")
        if self._metrics is None or self._board is None or not any(kind in (logs or {}) for kind in kinds):
            return
        values = {
            NAMES.get(name, name): value
            for name, value in (logs or {}).items()
            if name in NAMES or not name.startswith(("eval_", "routing/"))
        }
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"step {state.global_step}/{state.max_steps}  {shown}", flush=True)
        self._board.scalars(state.global_step, values)
        if "train/loss" in values:
            values |= layer_figures(self._routing.latest)
        self._metrics.write(state.global_step, values)

    def close(self) -> None:
        """Close the files."""
        for sink in (self._metrics, self._board):
            if sink is not None:
                sink.close()
        self._metrics = self._board = None


class StopCallback(TrainerCallback):
    """When a process was asked to stop by a signal, all save the same step and stop. See training/signals.py.

    So that the same command comes to what an uninterrupted run does, an epoch is validated at its end and nowhere
    else: a stop at its last step waits for that and its checkpoint.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = torch.tensor([float(stop_signal() is not None)], device=self._processes.device)
        if self._processes.world_size > 1:
            dist.all_reduce(asked)
        if asked.item() > 0:
            self.stopped = control.should_training_stop = True
            if not _epoch_is_over(state):
                control.should_save = control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped and not _epoch_is_over(state):  # the Trainer takes every end of its loop for that of an epoch
            control.should_evaluate = control.should_save = False


def _epoch_is_over(state: TrainerState) -> bool:
    return float(state.epoch or 0).is_integer()
