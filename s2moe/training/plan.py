"""What a run would cost: parameters, memory per process and FLOPs, without allocating any of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s2moe.config.run import RunConfig
from s2moe.data import CorpusError
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import ModelSizes, model_sizes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT_BYTES = {"fp32": 4, "bf16": 4, "fp16": 2}  # bf16 gradients are added up in float32, see deepspeed_config
UNSHARDED_BF16_GRADIENTS = 2  # ZeRO 1 holds the last micro-batch's beside them, until all are added
OPTIMIZER_BYTES = 12  # float32 master copy and Adam's two moments, of the parameters a process updates


@dataclass(frozen=True)
class MemoryPerProcess:
    """Bytes that one process holds of weights, gradients and optimizer state. Activations come on top."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


class _Offloaded(MemoryPerProcess):
    """With the optimizer's state in the host's memory."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients


def memory_per_process(
    dense: int, experts: int, world_size: int, expert_parallel: int, zero_stage: int, precision: str
) -> tuple[MemoryPerProcess, MemoryPerProcess]:
    """Memory of one process for the `dense` parameters, which all have, and for the `experts`, which are dealt out.

    ZeRO shards dense state over all processes and an expert's over those that hold it (stage 1: the
    optimizer's, 2: gradients too, 3: weights too).
    """

    unsharded_gradient = GRADIENT_BYTES[precision] + (UNSHARDED_BF16_GRADIENTS if precision == "bf16" else 0)

    def of(parameters: int, held_by: int) -> MemoryPerProcess:
        local, sharded = parameters / held_by, parameters / world_size
        return MemoryPerProcess(
            weights=BYTES[precision] * (sharded if zero_stage >= 3 else local),
            gradients=GRADIENT_BYTES[precision] * sharded if zero_stage >= 2 else unsharded_gradient * local,
            optimizer=OPTIMIZER_BYTES * sharded,
        )

    return of(dense, 1), of(experts, expert_parallel)


def vocabulary(config: RunConfig) -> tuple[int, str]:
    """Symbols that the run's model will have, and a note where the corpus is not there to tell (else empty)."""
    try:
        return config.data.open().metadata.vocab_size, ""
    except CorpusError as error:
        size = config.model["vocab_size"] or 256
        return size, f"note: counting with a vocabulary of {size}: {error}"


def plan(config: RunConfig, model_config: S2MoEConfig, world_size: int) -> str:
    """The text that `--dry-run` prints. The model is built on the meta device, which checks the configuration."""
    with torch.device("meta"):
        model = S2MoEForCausalLM(model_config)
    sizes, moe = model_sizes(model_config), model_config.moe_config()
    built = sum(parameter.numel() for parameter in model.parameters())
    training = config.training
    tokens = training.global_batch * training.sequence_length
    flops = sizes.flops_per_token(training.sequence_length)
    lines = [
        f"{config.name}: {model_config.num_hidden_layers} layers, width {model_config.hidden_size}, "
        f"{moe.num_experts} experts, {moe.title()}",
        "",
        "parameters",
        *_parameter_lines(sizes, built),
        "",
        f"memory per process: {world_size} processes = {training.expert_parallel} expert-parallel x "
        f"{world_size // training.expert_parallel} copies of the experts, ZeRO stage {training.zero_stage}, "
        f"{training.precision}",
        *_memory_lines(config, sizes, built, world_size),
        "",
        "a step",
        f"  {training.global_batch:,} sequences x {training.sequence_length:,} = {tokens:,} tokens; "
        f"{config.micro_batch(world_size)} sequences per forward pass, {config.accumulation_steps(world_size)} of them",
        f"  {flops / 1e9:,.3f} GFLOPs per token, {_human(flops * tokens)}FLOPs per step, "
        f"{_human(float(flops) * tokens * training.steps)}FLOPs in {training.steps:,} steps "
        f"over {tokens * training.steps:,} tokens",
    ]
    return "\n".join(lines)


def _parameter_lines(sizes: ModelSizes, built: int) -> list[str]:
    kinds = ("embedding", "attention", "dense", "experts", "router", "norm")
    rows = [("total", built), ("active for one token", sizes.active - sizes.total + built)]
    rows += [(f"  {kind}", getattr(sizes, kind)) for kind in kinds]
    return [f"  {name:22}{count:>18,}" for name, count in rows]


def _memory_lines(config: RunConfig, sizes: ModelSizes, built: int, world_size: int) -> list[str]:
    training = config.training
    dense, experts = memory_per_process(
        built - sizes.experts,
        sizes.experts,
        world_size,
        training.expert_parallel,
        training.zero_stage,
        training.precision,
    )
    rows = [("weights", "weights"), ("gradients", "gradients")]
    if training.offload_optimizer:
        dense, experts = (_Offloaded(**vars(part)) for part in (dense, experts))
        rows += [("total", "total"), ("in the host's memory", "optimizer")]
    else:
        rows += [("optimizer state", "optimizer"), ("total", "total")]
    lines = [f"  {'GiB':22}{'dense':>10}{'experts':>10}{'both':>10}"]
    for label, name in rows:
        parts = [getattr(dense, name) / 2**30, getattr(experts, name) / 2**30]
        lines.append(f"  {label:22}" + "".join(f"{value:>10.3f}" for value in (*parts, sum(parts))))
    return [*lines, "  activations and communication buffers come on top"]


def _human(number: float) -> str:
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= factor:
            return f"{number / factor:,.2f} {prefix}"
    return f"{number:,.0f} "
