"""Training that goes on in another shape, on the ranks of a test."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist

from s2moe import S2MoEForCausalLM
from s2moe.config import ConfigError
from s2moe.moe.freezing import freeze_named
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import deepspeed_compat
from s2moe.training.processes import Processes
from s2moe.training.reshape import on_first
from tests.distributed import run_jobs
from tests.distributed.jobs import VOCABULARY, tiny_config
from tests.distributed_harness import reset_groups

MICRO_BATCHES = 4  # of one sequence each, in every step, whatever the number of ranks
BEFORE, AFTER = 3, 3  # steps
LR = 0.01


class Trainer:
    """An engine of one shape, and a step of it that depends on nothing but the step's number.

    The experts' group has another learning rate and betas than the others, so that groups cannot be mixed up
    unnoticed.
    """

    def __init__(
        self, degree: int, stage: int, moe: dict[str, Any], freeze: str = "none", precision: str = "fp32", seed: int = 0
    ) -> None:
        reset_groups()
        torch.manual_seed(seed)
        model = S2MoEForCausalLM(tiny_config(**moe), parallel=deepspeed_compat.expert_parallel(degree))
        freeze_named(model, freeze)
        groups = deepspeed_compat.optimizer_groups(model, 0.1)
        for group in groups:
            if group.get("moe") and not group.get(deepspeed_compat.FROZEN):
                group.update(lr=LR / 2, betas=(0.8, 0.9))
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
        self.accumulation = MICRO_BATCHES // dist.get_world_size()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": stage, "sub_group_size": 5000},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(self, step: int) -> float:
        """One optimizer step; the mean loss before it."""
        world, rank = dist.get_world_size(), dist.get_rank()
        tokens = torch.randint(0, VOCABULARY, (MICRO_BATCHES, 17), generator=torch.Generator().manual_seed(step % 2))
        total, routing = torch.zeros((), dtype=torch.float64), []
        for index in range(self.accumulation):
            microbatch = index * world + rank
            mine = tokens[microbatch : microbatch + 1]
            context = RoutingContext(step=step, steps=BEFORE + AFTER, microbatch=microbatch)
            output = self.engine(input_ids=mine[:, :-1], shift_labels=mine[:, 1:].contiguous(), context=context)
            self.engine.backward(output.loss)
            total += output.loss.detach().double()
            routing.append(output.routing)
            self.engine.step()
        self.engine.module.update_routers(routing)
        dist.all_reduce(total)
        return float(total / MICRO_BATCHES)

    def steps(self, first: int, last: int) -> list[float]:
        """Losses of the steps from ``first`` until before ``last``."""
        return [self.step(step) for step in range(first, last)]


def uninterrupted(degree: int, stage: int, moe: dict[str, Any], freeze: str, precision: str) -> list[float]:
    """The losses of all steps."""
    return Trainer(degree, stage, moe, freeze, precision).steps(0, BEFORE + AFTER)


def write(shapes: dict[str, tuple[int, int]], moe: dict[str, Any], freeze: str, precision: str, folder: str) -> None:
    """Train the steps before in each shape, save, and convert: ``folder``/native/NAME and ``folder``/universal/NAME."""
    native, universal = Path(folder, "native"), Path(folder, "universal")
    for name, shape in shapes.items():
        trainer = Trainer(*shape, moe, freeze, precision)
        trainer.steps(0, BEFORE)
        trainer.engine.save_checkpoint(str(native), tag=name, save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            deepspeed_compat.to_universal(native / name, universal / name)
        dist.barrier()


def resume(
    shape: tuple[int, int], names: list[str], moe: dict[str, Any], freeze: str, precision: str, folder: str
) -> dict[str, list[float]]:
    """The losses of the steps after, from each of the universal checkpoints, in one shape."""
    losses = {}
    for name in names:
        trainer = Trainer(*shape, moe, freeze, precision, seed=1)  # its weights are not the checkpoint's
        deepspeed_compat.load_universal(trainer.engine, Path(folder, "universal", name))
        losses[name] = trainer.steps(BEFORE, BEFORE + AFTER)
    return losses


# --- DeepSpeed's own loading, without what load_universal mends ----------------------------------------


def direct(degree: int, stage: int, moe: dict[str, Any], folder: str, name: str) -> list[float]:
    """The losses after, from a checkpoint loaded as it is."""
    trainer = Trainer(degree, stage, moe, seed=1)
    trainer.engine.load_checkpoint(str(Path(folder, "native")), tag=name)
    return trainer.steps(BEFORE, BEFORE + AFTER)


def unmended(degree: int, stage: int, moe: dict[str, Any], folder: str, name: str) -> dict[str, Any]:
    """What DeepSpeed's universal loading leaves behind."""
    trainer = Trainer(degree, stage, moe, seed=1)
    engine = trainer.engine
    engine._config.load_universal_checkpoint = True
    with deepspeed_compat.safe_loading(mmap=False):
        engine.load_checkpoint(str(Path(folder, "universal")), tag=name)
    engine._config.load_universal_checkpoint = False
    buffers = {key: buffer.clone() for key, buffer in engine.module.named_buffers()}
    steps = [state["step"] for state in engine.optimizer.optimizer.state.values()]
    return {
        "groups": [{"lr": group["lr"], "betas": tuple(group["betas"])} for group in engine.optimizer.param_groups],
        "shared_step": len(steps) > 1 and all(step is steps[0] for step in steps),
        "bias": buffers["model.layers.0.moe.router.bias_E"].abs().max().item(),
        "losses": trainer.steps(BEFORE, BEFORE + AFTER),
    }


def run_on_a_full_disk(corpus: str, output: str) -> None:
    """One process goes on with the run of two while the disk has a few kilobytes left."""
    free = shutil.disk_usage(output)._replace(free=10_000)
    settings = {"training.expert_parallel": 1, "model.moe.router.balance_scope": "local"}
    with mock.patch.object(shutil, "disk_usage", return_value=free):
        run_jobs.run(corpus, output, settings, None, 0)


def wait_for_first(kind: str) -> dict[str, Any]:
    """Process 0 works for about a second; how often progress was noticed here, and the error."""
    progress = 0

    def note() -> None:
        nonlocal progress
        progress += 1

    def work(goes_on: Callable[[], None]) -> None:
        if kind == "stuck":
            time.sleep(0.8)
            return
        for _ in range(4):
            time.sleep(0.25)
            goes_on()
        if kind == "refused":
            raise ConfigError("the disk is too small")
        if kind == "broken":
            raise KeyError("gone")

    rank, world = dist.get_rank(), dist.get_world_size()
    error = None
    try:
        on_first(Processes(rank, rank, world, torch.device("cpu")), work, note)
    except (ConfigError, KeyError) as found:
        error = str(found)
    return {"progress": progress, "error": error}
