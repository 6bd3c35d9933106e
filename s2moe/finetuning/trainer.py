"""transformers' Trainer for sparse mixtures of experts: losses, optimizer, expert parallelism, checkpoints.

The Trainer alone does five things wrong with such a model, without an error:
- with label smoothing, or a loss function of one's own, the auxiliary losses are lost;
- label smoothing of a language model does not shift the labels, as it knows transformers' own classes by name;
- its optimizer's groups are not those that DeepSpeed needs for experts;
- a saved model holds rank 0's experts only;
- a checkpoint of another expert-parallel degree continues, wrongly.

On CPU processes accelerate finds DeepSpeed only if it is told before the arguments are made, see ``cpu_processes``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from s2moe.config.learning_rates import LearningRates
from s2moe.config.options import ConfigError
from s2moe.models.routed import batch_share, label_count
from s2moe.moe.layer import expert_degree
from s2moe.parallel import deepspeed_compat
from s2moe.training.checkpoint import remove, remove_half_removed
from s2moe.training.errors import TrainingError
from s2moe.training.export import gather_state
from s2moe.training.writing import sync

from .adapters import adapted_expert, freeze_what_an_adapter_leaves, is_adapter
from .callback import RoutingCallback, mean_figures
from .optimizer import parameter_groups
from .reading import SafeReading

COMPLETE = (
    "s2moe_checkpoint.json"  # written last into a checkpoint: how the run was spread, and that all of it is there
)


class S2MoETrainerMixin(SafeReading):
    """For a Trainer class of one's own: ``class Mine(S2MoETrainerMixin, Trainer)``. See S2MoETrainer.

    Args:
        learning_rates: factors of the learning rate by depth.
        routing: the callback that speaks to the layers; None makes one.

    Raises:
        ConfigError: the arguments would train or save wrongly, saying what to change.
    """

    optimizer: Any
    remedy = "a lower learning rate, more warm-up steps or a smaller max_grad_norm"  # for a loss that is not finite

    def __init__(
        self,
        *args: Any,
        learning_rates: LearningRates | None = None,
        routing: RoutingCallback | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_names is None:
            self.label_names = ["labels"]
        self.learning_rates = learning_rates or LearningRates()
        self.routing = routing or RoutingCallback()
        self.add_callback(self.routing)
        self._losses: Tensor | None = None  # sums of task and auxiliary loss since the last log event, float64
        self._losses_from = 0
        check_arguments(self)
        freeze_what_an_adapter_leaves(self.model)

    # --- losses ---------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss, smoothed or computed as the Trainer was told, plus the auxiliary loss.

        The auxiliary loss has the batch's share of all labels whose losses are added up, as the task loss has: it
        weighs the same however many micro-batches a step accumulates.
        """
        labels = inputs.get("labels")
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs)
        task, aux = outputs.task_loss, outputs.aux_loss
        aux = torch.zeros_like(task) if aux is None else aux * self._share(inputs, num_items_in_batch)
        if self.compute_loss_func is not None:
            task = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif self.label_smoother is not None and labels is not None:
            shifted = self._loss_shifts_labels
            count = label_count(self._targets(inputs), num_items_in_batch)
            task = self.label_smoother(outputs, labels, shift_labels=shifted, num_items_in_batch=count)
        both = torch.stack([task, aux.to(task.dtype)]) * self._scale(num_items_in_batch)
        if model.training and torch.is_grad_enabled():
            parts = 1 if self._scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
            loss = both.detach().double() / parts
            self._losses = loss if self._losses is None else self._losses + loss
        return (both.sum(), outputs) if return_outputs else both.sum()

    def _scaled(self, num_items_in_batch: Any) -> bool:
        """Whether losses of micro-batches add up to the batch's; otherwise the Trainer divides each by their number."""
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _share(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor | float:
        """This micro-batch's part of the auxiliary loss."""
        if num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps if self._scaled(None) else 1.0
        return batch_share(self._targets(inputs), num_items_in_batch)

    def _targets(self, inputs: dict[str, Any]) -> Tensor:
        """What is to be predicted, -100 for nothing."""
        shifted: Tensor | None = inputs.get("shift_labels")
        if shifted is not None:
            return shifted
        labels: Tensor = inputs["labels"]
        return labels[..., 1:] if self._loss_shifts_labels else labels

    def _scale(self, num_items_in_batch: Any) -> int:
        """What DeepSpeed or DDP divides gradients by, where losses are divided by the labels of all processes."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices or not self._scaled(1):
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the Trainer's loss its parts, and each router figure's mean over layers. Collective."""
        if "loss" in logs:
            logs |= self._loss_figures() | mean_figures(self.routing.reduce())
        super().log(logs, start_time)

    def _loss_figures(self) -> dict[str, float]:
        """Means of task and auxiliary loss since the last log event, over steps and processes. Collective."""
        steps = self.state.global_step - self._losses_from
        total = self._finite_losses() / max(steps, 1)
        self._losses, self._losses_from = None, self.state.global_step
        return {"task_loss": total[0].item(), "aux_loss": total[1].item()}

    def _finite_losses(self) -> Tensor:
        """Sum of the losses since the last log event, the mean over processes. Collective.

        Raises:
            TrainingError: on all processes, if it is not finite. The Trainer itself would go on.
        """
        total = torch.zeros(2, dtype=torch.float64) if self._losses is None else self._losses.clone()
        if self.args.world_size > 1:
            total = total.to(self.args.device)
            dist.all_reduce(total)
            total /= self.args.world_size
        if not math.isfinite(total.sum().item()):
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step} or shortly before. "
                f"Nothing was saved since: try {self.remedy}"
            )
        return total

    # --- optimizer ------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The arguments' optimizer, with groups for experts, frozen weights and learning rates of their own."""
        if self.optimizer is None:
            target = self.model if model is None else model
            made = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, target)
            cls, options = made
            if {"params", "model", "optimizer_dict"} & options.keys() or not isinstance(cls, type):
                raise ConfigError(
                    f"optim={self.args.optim}: this optimizer makes its own groups of weights, which know no experts"
                )
            groups = parameter_groups(target, options["lr"], self.args.weight_decay, self.learning_rates)
            self.optimizer = cls(groups, **options)
            if not self.is_deepspeed_enabled:
                deepspeed_compat.need_no_gradient(target)
        return self.optimizer

    # --- saving and resuming --------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, every process' experts included, for ``from_pretrained``. Collective."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = gather_state(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The mark goes before anything of an earlier one is overwritten, and comes after everything; then others go.

        Of the complete ones the newest ``save_total_limit`` stay, and the best one besides. The Trainer itself would
        delete others first, and without a mark what it has half deleted looks like a checkpoint.
        """
        self._finite_losses()
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (checkpoint / COMPLETE).unlink(missing_ok=True)
        if self.args.world_size > 1:
            dist.barrier()
        with self._deleting_none():
            super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            dist.barrier()
        if self.args.should_save:
            mark_complete(checkpoint, shape_of(self.accelerator, self.model))
            self._delete_older(checkpoint)

    @contextlib.contextmanager
    def _deleting_none(self) -> Iterator[None]:
        """Within it the Trainer deletes no checkpoint."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _delete_older(self, newest: Path) -> None:
        limit, complete = self.args.save_total_limit, complete_checkpoints(newest.parent)
        if limit is None or limit <= 0:
            return
        best = newest.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        for path in complete[:-limit]:
            if path not in (newest, best):
                remove(path)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(*args, **kwargs)
        best = Path(self._get_output_dir(None), f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if (best / COMPLETE).is_file():  # where it is now: the directory may have been moved
            self.state.best_model_checkpoint = str(best)
        return found

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._deleting_none():  # the last one too stays, so that a finished run is not trained again
            return super()._finalize_training(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. With True it continues from the newest complete checkpoint.

        Raises:
            ConfigError: the checkpoint is not complete, was written by a run that was spread otherwise, cannot be read,
                or would run code.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ConfigError(f"no complete checkpoint in {self.args.output_dir}")
        if resume_from_checkpoint:
            require_same_shape(Path(resume_from_checkpoint), shape_of(self.accelerator, self.model))
        if self.args.should_save:
            remove_half_removed(Path(self.args.output_dir), PREFIX_CHECKPOINT_DIR)
        self._losses, self._losses_from = None, step_of(resume_from_checkpoint or "")
        return super().train(resume_from_checkpoint or None, *args, **kwargs)


class S2MoETrainer(S2MoETrainerMixin, Trainer):
    """transformers.Trainer for the models of this project.

    Auxiliary losses behave under gradient accumulation, label smoothing and padding, and are logged beside the task
    loss; routers follow the Trainer's steps (RoutingCallback); it works with DeepSpeed's ZeRO 1 to 3 and expert
    parallelism, saves all experts, resumes, and loads the best model at the end. ``save_total_limit`` counts the newest
    checkpoints; the best one is kept besides.

    To freeze routers or experts, ``s2moe.moe.freezing.freeze(model)`` before the Trainer is made. With expert
    parallelism, first the TrainingArguments, then ``deepspeed_compat.expert_parallel(degree)``, then the model by
    ``load_pretrained(..., parallel=...)``.
    """


def deepspeed_settings(stage: int = 1, precision: str = "fp32") -> dict[str, Any]:
    """What ``TrainingArguments(deepspeed=...)`` needs; the rest follows the arguments."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "contiguous_gradients": True, "reduce_scatter": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": None if precision == "fp16" else "fp32"},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 2**31,
    }


def cpu_processes() -> dict[str, Any]:
    """Make accelerate see this process' gloo group and DeepSpeed on it; what TrainingArguments then needs besides.

    With ``use_cpu=True`` accelerate would leave DeepSpeed out without an error. To be called in every process before
    TrainingArguments are made: ``TrainingArguments(..., **cpu_processes())``.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    deepspeed_compat.leave_out_shared_memory()
    PartialState(backend="gloo")
    return {"accelerator_config": {"use_configured_state": True}}


def check_arguments(trainer: Any) -> None:
    """Raise ConfigError for what would train or save wrongly without an error."""
    args, model = trainer.args, trainer.model
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process with {args.n_gpu} GPUs: torch's DataParallel cannot put the layers' statistics together. "
            "Start a process for each with torchrun, accelerate or deepspeed, or show it one: CUDA_VISIBLE_DEVICES=0"
        )
    _warn_of_half_weights(trainer)
    if args.deepspeed and (args.use_cpu or trainer.accelerator.distributed_type != DistributedType.DEEPSPEED):
        raise ConfigError(
            "deepspeed=... may have no effect: with use_cpu=True accelerate leaves it out. On CPU processes use "
            "TrainingArguments(..., **cpu_processes()) and leave use_cpu alone"
        )
    if expert_degree(model) > 1 and args.save_on_each_node:
        raise ConfigError("save_on_each_node=True: with expert parallelism one process gathers and writes all experts")
    check_accelerator(trainer.accelerator, model)
    if not trainer.is_deepspeed_enabled:
        return
    settings = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    grouped = deepspeed_compat.frozen_experts(model) or trainer.learning_rates != LearningRates()
    if "optimizer" in settings and grouped:
        raise ConfigError(
            "DeepSpeed's own optimizer knows neither frozen experts nor learning rates by depth: take `optimizer` out "
            "of the DeepSpeed configuration, and the Trainer makes one"
        )


def _warn_of_half_weights(trainer: Any) -> None:
    """Optimizers lose small updates of 16-bit weights; DeepSpeed keeps float32 copies if it is told of them."""
    kinds = {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad}
    half = kinds & {torch.bfloat16, torch.float16}
    if half and not (trainer.is_deepspeed_enabled and (trainer.args.bf16 or trainer.args.fp16)):
        warnings.warn(
            f"weights in {', '.join(sorted(map(str, half)))} are trained as they are, and lose small updates: load the "
            "model with dtype=torch.float32 (load_pretrained does); bf16=True then computes in bfloat16",
            stacklevel=2,
        )


def check_accelerator(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise ConfigError where accelerate, as it was set up, would train the model wrongly without an error."""
    degree = expert_degree(model)
    kind = accelerator.distributed_type
    if degree > 1 and kind != DistributedType.DEEPSPEED:
        raise ConfigError("expert parallelism needs DeepSpeed: anything else would average different experts")
    if degree > 1 and not accelerator.even_batches:
        raise ConfigError("even_batches=False: with expert parallelism all processes take part in every forward pass")
    if kind == DistributedType.FSDP:
        raise ConfigError("FSDP is not supported with this project's experts: use DeepSpeed, whose ZeRO 3 is its like")
    if kind != DistributedType.DEEPSPEED:
        return
    if is_adapter(model) and (adapted := adapted_expert(model)):
        raise ConfigError(
            f"LoRA on experts ({adapted}) under DeepSpeed is not supported: its engine would average adapters of "
            "different experts. Adapt the attention alone, or train in one process, or in several without DeepSpeed"
        )
    deepspeed_compat.check_version()
    stage = accelerator.state.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"ZeRO {stage} is not supported: DeepSpeed then clips gradients by a norm that depends on expert "
            "parallelism. Use stage 1, which costs nothing more"
        )


def shape_of(accelerator: Accelerator, model: nn.Module) -> dict[str, int]:
    """How training is spread; its checkpoints continue in the same shape only."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return {
        "processes": accelerator.num_processes,
        "expert_parallel": expert_degree(model),
        "zero_stage": 0 if plugin is None else plugin.zero_stage,
        "precision": 16 if accelerator.mixed_precision in ("fp16", "bf16") else 32,
    }


def mark_complete(checkpoint: Path, shape: dict[str, int]) -> None:
    """Write into a checkpoint, when all else is on the disk, how training was spread."""
    for path in checkpoint.rglob("*"):
        sync(path)
    temporary = (checkpoint / COMPLETE).with_suffix(".tmp")
    temporary.write_text(json.dumps(shape), encoding="utf-8")
    os.replace(temporary, checkpoint / COMPLETE)


def require_same_shape(checkpoint: Path, now: dict[str, int]) -> None:
    """Raise ConfigError unless the checkpoint is complete and of a run that was spread as this one."""
    try:
        saved = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{checkpoint} is not complete, or not written by S2MoETrainer (it has no {COMPLETE}): continue from "
            "another one, or with resume_from_checkpoint=True from the newest that is complete"
        ) from None
    changes = [f"{name} was {saved.get(name)}, is {value}" for name, value in now.items() if saved.get(name) != value]
    if changes:
        raise ConfigError(f"cannot continue from {checkpoint}: {'; '.join(changes)}. Start it as it was written")


def newest_checkpoint(directory: str | Path, prefix: str = PREFIX_CHECKPOINT_DIR) -> str | None:
    """The complete checkpoint PREFIX-STEP with the highest step in a directory, by default a Trainer's output."""
    found = complete_checkpoints(Path(directory), prefix)
    return str(found[-1]) if found else None


def complete_checkpoints(directory: Path, prefix: str = PREFIX_CHECKPOINT_DIR) -> list[Path]:
    """The complete checkpoints PREFIX-STEP in a directory, by their steps."""
    return sorted((path.parent for path in directory.glob(f"{prefix}-*/{COMPLETE}")), key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """The step in a checkpoint's name; 0 where there is none."""
    _, _, step = Path(checkpoint).name.rpartition("-")
    return int(step) if step.isdecimal() else 0
