"""A loop of one's own under accelerate: what S2MoETrainer does for its own.

accelerate alone would do three things wrong, without an error: average different experts where it was started
without DeepSpeed, clip by another norm under ZeRO 0, and continue from a state of another expert-parallel degree with
moments of other experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.constants import RNG_STATE_NAME
from torch import nn

from s2moe.config.options import ConfigError
from s2moe.moe.layer import SMoELayer
from s2moe.parallel import deepspeed_compat
from s2moe.training.ranks import from_first

from .adapters import freeze_what_an_adapter_leaves
from .callback import connect
from .reading import reading
from .trainer import (
    COMPLETE,
    check_accelerator,
    mark_complete,
    newest_checkpoint,
    require_same_shape,
    shape_of,
    step_of,
)

STATE = "state"  # the directory of one is STATE-STEP


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Any, *others: Any) -> tuple[Any, ...]:
    """``accelerator.prepare``, after a look at whether it can train this model, and with loads of all processes.

    Raises:
        ConfigError: it would train wrongly, saying what to change.
    """
    check_accelerator(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        sparse = any(isinstance(layer, SMoELayer) for layer in model.modules())
        if sparse and not any(group.get("moe") for group in getattr(optimizer, "param_groups", [])):
            raise ConfigError(
                "DeepSpeed wants experts in groups of their own: give the optimizer parameter_groups(model, lr, "
                "weight_decay) of s2moe.finetuning.optimizer, not model.parameters()"
            )
    else:
        deepspeed_compat.need_no_gradient(model)
    freeze_what_an_adapter_leaves(model)
    connect(model)
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    return prepared


def save_state(accelerator: Accelerator, model: nn.Module, directory: Path | str, step: int) -> None:
    """``accelerator.save_state`` to directory/state-STEP, complete when this returns. Collective.

    Args:
        model: as ``prepare`` returned it.
    """
    target = Path(directory) / f"{STATE}-{step}"
    if accelerator.is_main_process:
        (target / COMPLETE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()  # before anything of it is overwritten
    accelerator.save_state(str(target))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark_complete(target, shape_of(accelerator, accelerator.unwrap_model(model)))
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, model: nn.Module, directory: Path | str) -> int:
    """Continue from the newest complete state in `directory`; the steps that were done then, 0 if there is none.

    Nothing in it is executed: objects that the loop registered for checkpointing may hold tensors, numbers and
    containers of them, no classes of their own.

    Raises:
        ConfigError: it was written by a loop that was spread otherwise, cannot be read, or would run code.
    """
    newest = from_first(newest_checkpoint(directory, STATE))
    if newest is None:
        return 0
    require_same_shape(Path(newest), shape_of(accelerator, accelerator.unwrap_model(model)))
    with reading(newest):
        for file in Path(newest).glob(f"{RNG_STATE_NAME}_*.pkl"):  # accelerate goes on without those it cannot read
            deepspeed_compat.load_file(file, mmap=False)
        accelerator.load_state(newest)
    return step_of(newest)
