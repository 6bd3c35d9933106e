"""From a run's settings to a DeepSpeed engine around the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from s2moe.config.run import OptimizerConfig, RunConfig
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.moe.freezing import freeze_named
from s2moe.parallel import deepspeed_compat
from s2moe.parallel.sequence_parallel import spread_sequences

from .processes import Processes
from .quiet import no_prints

if TYPE_CHECKING:
    from s2moe.config.vision import VisionRunConfig

    from .initial import InitialWeights

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]] = {  # by `optimizer.name`
    "adam": lambda groups, of: torch.optim.Adam(groups, lr=of.lr, betas=of.betas, eps=of.eps, fused=True),
    "adamw": lambda groups, of: torch.optim.AdamW(groups, lr=of.lr, betas=of.betas, eps=of.eps, fused=True),
    "sgd": lambda groups, of: torch.optim.SGD(groups, lr=of.lr, momentum=of.momentum, fused=True),
    "rmsprop": lambda groups, of: torch.optim.RMSprop(groups, lr=of.lr, momentum=of.momentum, eps=of.eps),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(
    config: RunConfig, model_config: S2MoEConfig, processes: Processes, initial: InitialWeights | None = None
) -> Any:
    """The engine: this process' part of the model, its optimizer, ZeRO and mixed precision. Collective.

    Only the experts this process owns are ever built; initial weights do not depend on the number of
    processes. They are drawn, or `initial`.
    """
    parallel = deepspeed_compat.expert_parallel(config.training.expert_parallel)
    torch.manual_seed(config.seed)
    model = S2MoEForCausalLM(model_config, parallel).to(processes.device)
    if initial is not None:
        initial.fill(model)
    if config.training.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.training.sequence_parallel > 1:
        micro_batch = config.micro_batch(processes.world_size)
        spread_sequences(model, config.training.sequence_parallel, micro_batch, config.training.sequence_length)
    freeze_named(model, config.training.freeze)
    engine = start_engine(model, config, processes)
    if config.training.compile:
        compile_dense_parts(model)
    return engine


def start_engine(model: nn.Module, config: RunConfig | VisionRunConfig, processes: Processes) -> Any:
    """The engine around a model on its device, with the optimizer of the settings. Collective."""
    import deepspeed

    with no_prints():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, config.optimizer),
            config=deepspeed_config(config, processes.world_size),
            dist_init_required=False,
        )
    return engine


def make_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of all that is trained."""
    decay_all = settings.decayed == "all"
    groups = deepspeed_compat.optimizer_groups(model, settings.weight_decay, decay_all=decay_all)
    return OPTIMIZERS[settings.name](groups, settings)


def deepspeed_config(config: RunConfig | VisionRunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run. Its learning-rate schedule and logging stay unused."""
    training = config.training
    zero: dict[str, Any] = {"stage": training.zero_stage, "contiguous_gradients": True, "reduce_scatter": True}
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": training.global_batch * training.sequence_parallel,  # each part counts as a sequence
        "train_micro_batch_size_per_gpu": config.micro_batch(world_size),
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW steps on the CPU as well. DeepSpeed's own is compiled at its first use, for minutes.
        "zero_force_ds_cpu_optimizer": False,
        # Without it bf16 gradients of accumulated micro-batches are added up in bf16.
        "data_types": {"grad_accum_dtype": None if training.precision == "fp16" else "fp32"},
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "steps_per_print": 2**31,
    }


def compile_dense_parts(model: S2MoEForCausalLM) -> None:
    """torch.compile each block's attention, in place. Routing and experts have shapes that change at every step."""
    for layer in model.model.layers:
        cast(nn.Module, layer.attention).compile()


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of the next optimizer step, for all that is not frozen."""
    for group in engine.optimizer.param_groups:
        if not group.get(deepspeed_compat.FROZEN):
            group["lr"] = rate
