"""What an SMoE model needs of a training loop, and what it reports, as a callback for any Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import LayerStatistics, RoutingContext
from s2moe.training.routing_totals import LayerTotals, RoutingTotals
from s2moe.training.run_log import layer_figures
from s2moe.training.tensorboard import TensorBoard

from .adapters import freeze_what_an_adapter_leaves


class RoutingCallback(TrainerCallback):
    """With transformers.Trainer, its own subclasses included, and a model of this project.

    Before every forward pass in training it gives the layers their RoutingContext: seed and step, which key their
    noise; the run's length, which schedules follow (StableMoE's stages, SMoE-Dropout's k); the number of the
    micro-batch. Dropout is keyed by the same, and rank. After every optimizer step it hands the routers the feedback
    of all its micro-batches and ranks, once (selection biases, thresholds). And it writes each layer's load and figures
    to TensorBoard, at the Trainer's logging steps.

        Trainer(model=model, args=args, callbacks=[RoutingCallback()], ...).train()

    Args:
        directory: of the event files; None: ``tensorboard`` in the Trainer's output directory.
        images_every: log events between pictures of the load; 0: none.
        write: whether to write event files at all.

    Attributes:
        latest: the layers' totals of the last log event.
    """

    def __init__(self, directory: str | Path | None = None, images_every: int = 10, write: bool = True) -> None:
        self.directory = directory
        self.images_every = images_every
        self.write = write
        self.latest: list[LayerTotals] = []
        self._totals = RoutingTotals()
        self._pending: list[tuple[LayerStatistics, ...]] = []
        self._microbatch = 0
        self._events = 0
        self._reduced = False
        self._hooks: list[Any] = []
        self._board: TensorBoard | None = None
        self._model: Any = None
        self._draws = ExitStack()  # of a forward pass

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._close()
        self._model = routed_model(model)
        self._args, self._state = args, state
        freeze_what_an_adapter_leaves(model)
        connect(self._model)
        self._hooks = [
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._model.register_forward_hook(self._after_forward),
        ]
        if self.write and state.is_world_process_zero:
            directory = Path(self.directory or Path(args.output_dir) / "tensorboard")
            self._board = TensorBoard(directory, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._state = state
        self._microbatch = 0
        self._pending = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pending:
            self._model.update_routers(self._pending)
        self._pending = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" not in (logs or {}):
            return  # a validation's, or the end's
        if not self._reduced:
            self.reduce()
        self._reduced = False
        if self._board is None:
            return
        self._board.scalars(state.global_step, layer_figures(self.latest))
        if self.images_every and self._events % self.images_every == 1 % self.images_every:
            self._board.loads(state.global_step, self.latest)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    def reduce(self) -> list[LayerTotals]:
        """The layers' totals since the last log event, over all processes. Collective."""
        self.latest = self._totals.reduce()
        self._events += 1
        self._reduced = True
        return self.latest

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not model.training or kwargs.get("context") is not None:
            return None
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        context = RoutingContext(
            seed=self._args.seed,
            step=self._state.global_step,
            steps=self._state.max_steps,
            microbatch=self._microbatch * world + rank,
        )
        self._microbatch += 1
        self._draws.close()  # of a pass that failed
        self._draws.enter_context(drawing(context))
        return args, {**kwargs, "context": context}

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        self._draws.close()
        routing: Sequence[LayerStatistics] | None = getattr(output, "routing", None)
        if model.training and torch.is_grad_enabled() and routing:
            self._pending.append(tuple(layer._replace(loss=layer.loss.detach()) for layer in routing))
            self._totals.add(self._pending[-1])

    def _close(self) -> None:
        self._draws.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._board is not None:
            self._board.close()
            self._board = None


@contextmanager
def drawing(context: RoutingContext) -> Iterator[None]:
    """Within it dropout draws by step, micro-batch and rank; the Trainer's own state, the same on all ranks, stays."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(context.dropout_seed())
        yield


def routed_model(model: nn.Module) -> nn.Module:
    """The model of this project in `model`, which may be an adapter around it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if hasattr(module, "update_routers") and "context" in inspect.signature(module.forward).parameters:
            return module
    raise ValueError(f"{type(model).__name__} is not a model of this project: it takes no RoutingContext")


def connect(model: nn.Module) -> None:
    """Let the layers know that all processes together make the batch, where they were built without ExpertParallel.

    Loads, and what routers learn from them, are then counted over all ranks, and replicas stay equal.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for layer in model.modules():
        if isinstance(layer, SMoELayer) and layer.parallel.data_group is None:
            layer.parallel = replace(layer.parallel, data_group=dist.group.WORLD)


def mean_figures(layers: Sequence[LayerTotals]) -> dict[str, float]:
    """Each figure's mean over the layers that report it, as ``routing/balance_loss``, for one line of a log."""
    values: dict[str, list[float]] = {}
    for layer in layers:
        for name, value in layer_figures([layer]).items():
            if isinstance(value, float):
                values.setdefault(name.partition("/")[2], []).append(value)
    return {f"routing/{name}": sum(found) / len(found) for name, found in values.items()}
