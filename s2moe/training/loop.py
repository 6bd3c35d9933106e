"""The training loop on the DeepSpeed engine.

Whatever is random is keyed by (seed, step, micro-batch), and the data by the number of samples
consumed. So the loop carries no hidden state: an interrupted run continues exactly, and one process
that accumulates two micro-batches does what two processes with one each do. The exception is a balance
loss with balance_scope=global: its load is taken over the ranks of one micro-batch, so over fewer tokens
where micro-batches follow one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2moe.moe.feedback import update_routers
from s2moe.moe.routing import LayerStatistics, RoutingContext

from .checkpoint import TrainingState
from .diagnosis import find_cause
from .engine import set_learning_rate
from .errors import TrainingError
from .feed import Feed
from .processes import Processes
from .routing_totals import RoutingTotals
from .run_log import RunLog
from .schedule import lr_multiplier
from .signals import stop_signal
from .timing import Timing

if TYPE_CHECKING:
    from s2moe.config.run import RunConfig
    from s2moe.config.vision import VisionRunConfig

LOSSES = ("train/loss", "train/task_loss", "train/aux_loss")


@dataclass
class TrainingLoop:
    """Trains from `state.step` to the last step.

    Args:
        feed: the training data.
        validate: called with the step; logs a validation. Collective.
        probe: called with the step; looks into the SMoE layers. Collective.
        save: called after a step; writes a checkpoint of `state`. Collective.
        settle: called after every step; completes a checkpoint that is being written behind training. Collective.
        remains: says from where the same command goes on.
        flops_per_unit, peak_flops: for MFU; of a unit of the feed, and of one process' device, None where unknown.

    Attributes:
        signalled: whether a signal to some process has stopped it; the same on all processes.
    """

    config: RunConfig | VisionRunConfig
    engine: Any
    processes: Processes
    feed: Feed
    state: TrainingState
    log: RunLog
    timing: Timing
    validate: Callable[[int], None]
    probe: Callable[[int], None]
    save: Callable[[], None]
    settle: Callable[[], None] = lambda: None
    remains: Callable[[], str] = lambda: ""
    flops_per_unit: float = 0.0
    peak_flops: float | None = None
    signalled: bool = False
    _routing: RoutingTotals = field(default_factory=RoutingTotals)
    _interval: list[list[float]] = field(default_factory=list)  # losses and values of each step since the last event
    _values: tuple[str, ...] = ()  # names of those values
    _interval_seconds: float = 0.0
    _inputs: dict[str, Any] = field(default_factory=dict)  # of the last micro-batch
    _unchecked_norm: Any = None  # of the last step's gradient: a number, perhaps still being computed
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> bool:
        """Train; True when the last step is done, False when the time was up or a signal came before.

        Raises:
            TrainingError: the loss or the gradient is not finite. No checkpoint is written then.
        """
        steps, stop = self._steps, False
        self.engine.train()
        while self.state.step < steps and not stop:
            begin = time.monotonic()
            with self.timing.step(self.state.step + 1):
                stop = self._step()
            seconds = time.monotonic() - begin
            self.state.seconds += seconds
            self._interval_seconds += seconds
            self.log.step()
            self._after_step(stop)
        return self.state.step >= steps

    def _after_step(self, stop: bool) -> None:
        step, last = self.state.step, self.state.step == self._steps
        self.settle()
        save = _due(step, self.config.checkpoint.every) or last or stop
        # A log event averages over the steps since the one before. With one at every checkpoint, no
        # average spans an interruption.
        if _due(step, self.config.logging.every) or step == 1 or save:
            self._require_finite_gradient()
            self._log_event()
        if _due(step, self.config.probe.every) or (last and self.config.probe.every):
            self._require_finite_gradient()
            with self.timing.occasion("probe"):
                self.probe(step)
            self.engine.train()
        if last:
            self._save()  # before the whole validation, which may take long: stopped there, nothing is lost
        if _due(step, self.config.evaluation.every) or last:
            with self.timing.occasion("evaluation"):
                self.validate(step)
            self.engine.train()
        if save and not last:  # a resumed run has done the validation of its first step
            self._save()

    def _save(self) -> None:
        with self.timing.occasion("checkpoint"):
            self.save()

    def _step(self) -> bool:
        """One optimizer step; True when a process asks to stop."""
        config = self.config
        epoch = self.feed.epoch(self.state.samples)
        factor = lr_multiplier(config.schedule, self.state.step, self._steps, epoch)
        set_learning_rate(self.engine, config.optimizer.lr * factor)
        accumulation = config.accumulation_steps(self.processes.world_size)
        losses: list[Tensor] = []
        routing: list[tuple[LayerStatistics, ...]] = []
        for index in range(accumulation):
            with self.timing.micro_batch(self.state.step + 1, index):
                output = self._forward(index)
                with self.timing.phase("backward"):
                    self.engine.backward(output.loss)
            values = self.feed.values(self._inputs, output)
            self._values = tuple(values)
            losses.append(torch.stack([loss.detach().float() for loss in (*_losses(output), *values.values())]))
            if output.routing:
                routing.append(tuple(layer._replace(loss=layer.loss.detach()) for layer in output.routing))
                self._routing.add(routing[-1])
                self.timing.add(routing[-1])
            if index == accumulation - 1:
                with self.timing.phase("wait"):
                    stop = self._agree(losses)
            del output
            with self.timing.phase("step"):
                self.engine.step()
        self._unchecked_norm = self.engine.get_global_grad_norm()
        update_routers(self.engine.module, routing)
        self.state.step += 1
        self.state.samples += config.training.global_batch
        self.state.tokens += config.training.global_batch * self.feed.units
        return stop

    def _forward(self, index: int) -> Any:
        """Forward pass of this process' micro-batch with this accumulation index."""
        rank, world = self.processes.rank, self.processes.world_size
        with self.timing.phase("data"):
            self._inputs = self.feed.inputs(self.state.samples, index)
        context = RoutingContext(
            seed=self.config.seed,
            step=self.state.step,
            steps=self._steps,
            microbatch=index * world + rank,
            epoch=self.feed.epoch(self.state.samples),
        )
        torch.manual_seed(context.dropout_seed())
        with self.timing.phase("forward"):
            return self.engine(**self._inputs, context=context)

    @property
    def _steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.config.training.steps
        assert steps is not None
        return steps

    def _agree(self, losses: list[Tensor]) -> bool:
        """Mean losses of the step over all processes, kept for the log; True when a process asks to stop.

        The only wait for the device in a step. It comes before the optimizer, so that a bad loss
        never reaches the weights. A bad gradient of the step before did, and is found here or before
        the weights are saved.
        """
        limit = self.config.training.stop_after_minutes
        asks = limit is not None and time.monotonic() - self._started > 60 * limit
        total = torch.stack(losses).mean(0).double()
        total = torch.cat([total, total.new_tensor([float(asks), float(stop_signal() is not None)])])
        if self.processes.world_size > 1:
            dist.all_reduce(total)
        *mean, late, signalled = (total / self.processes.world_size).tolist()
        self._require_finite_gradient()
        if not math.isfinite(mean[0]):
            cause = find_cause(self.engine.module, [loss[0] for loss in losses], self._forward)
            raise TrainingError(self._stopped(self.state.step + 1, cause))
        self._interval.append(mean)
        self.signalled = signalled > 0
        return late > 0 or self.signalled

    def _require_finite_gradient(self) -> None:
        """Of the step before, if that has not been looked at."""
        norm, self._unchecked_norm = self._unchecked_norm, None
        overflow_is_normal = self.config.training.precision == "fp16"  # dynamic loss scaling skips such steps
        if norm is not None and not overflow_is_normal and not math.isfinite(norm):
            cause = f"the gradient is not finite (norm {float(norm)}), although the loss is"
            raise TrainingError(self._stopped(self.state.step, cause))

    def _stopped(self, step: int, cause: str) -> str:
        return (
            f"training stopped at step {step}: {cause}. Nothing of it was saved; {self.remains()}. Try a lower "
            "optimizer.lr, a longer schedule.warmup_steps or a smaller optimizer.clip"
            + (", or bf16 instead of fp16" if self.config.training.precision == "fp16" else "")
        )

    def _gradient_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _log_event(self) -> None:
        config, steps = self.config, len(self._interval)
        means = [sum(column) / steps for column in zip(*self._interval, strict=True)]
        unit, units = self.feed.unit, steps * config.training.global_batch * self.feed.units
        speed = units / max(self._interval_seconds, 1e-9)
        names = (*LOSSES, *(f"train/{name}" for name in self._values))
        values: dict[str, Any] = dict(zip(names, means, strict=True))
        values |= self.feed.figures(self.state, values)
        values["lr"] = self.engine.optimizer.param_groups[0]["lr"]
        values["grad_norm"] = self._gradient_norm()
        values[f"{unit}_per_second"] = speed
        if self.peak_flops and self.flops_per_unit:
            values["mfu"] = speed * self.flops_per_unit / (self.peak_flops * self.processes.world_size)
        if config.training.precision == "fp16":
            values["loss_scale"] = float(self.engine.optimizer.cur_scale)
            values["skipped_steps"] = self.engine.skipped_steps
        values |= self.timing.figures(steps, self._interval_seconds)
        values |= {"samples": self.state.samples, unit: self.state.tokens, "seconds": self.state.seconds}
        self.log.training(self.state.step, values, self._routing.reduce())
        self._interval, self._interval_seconds = [], 0.0


def _losses(output: Any) -> tuple[Tensor, Tensor, Tensor]:
    aux = output.aux_loss if output.aux_loss is not None else torch.zeros_like(output.task_loss)
    return output.loss, output.task_loss, aux


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
