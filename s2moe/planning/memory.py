"""Memory of one process by kind: what DeepSpeed holds of the parameters, what a micro-batch adds."""

from __future__ import annotations

from dataclasses import dataclass

from s2moe.config.run import RunConfig
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import ModelSizes
from s2moe.training.plan import BYTES, memory_per_process

from .activations import MicroBatch, activations

BUCKET = 5e8  # parameters; DeepSpeed's reduce_bucket_size, which engine.deepspeed_config leaves as it is
LIVE = 1e9  # parameters that ZeRO 3 gathers at most, its stage3_max_live_parameters
CONTEXT = 1.5 * 2**30  # CUDA's own, kernels and NCCL's buffers
USABLE = 0.94  # of a GPU's memory; the rest gets lost between the allocator's blocks


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by kind."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float  # DeepSpeed's for reduction, and ZeRO 3's gathered weights
    activations: float  # kept for the backward pass
    logits: float  # with what the loss makes of them
    recomputed: float  # one layer's, with activation checkpointing
    dispatch: float  # rows underway between ranks in one layer, at the planned imbalance
    workspace: float  # of one layer's backward
    context: float
    total: float  # at the fullest moment: logits and what a layer needs are not there at the same time

    def fits(self, memory: float) -> bool:
        """In a GPU of so many bytes."""
        return self.total <= USABLE * memory


def memory(
    config: RunConfig, model: S2MoEConfig, sizes: ModelSizes, world_size: int, imbalance: float, on_gpu: bool
) -> Memory:
    """Of the process with the most rows; `imbalance` is its rows over the mean, in the worst layer."""
    training = config.training
    shape = (world_size, training.expert_parallel, training.zero_stage, training.precision)
    dense, experts = memory_per_process(sizes.total - sizes.experts, sizes.experts, *shape)
    kept = activations(model, micro_batch(config, world_size, imbalance, on_gpu))
    optimizer = 0.0 if training.offload_optimizer else dense.optimizer + experts.optimizer  # in the host's memory
    weights, gradients = dense.weights + experts.weights, dense.gradients + experts.gradients
    context = CONTEXT if on_gpu else 0.0
    reserved = buffers(training.zero_stage, training.precision, sizes, training.expert_parallel)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=reserved,
        activations=kept.kept,
        logits=kept.logits,
        recomputed=kept.recomputed,
        dispatch=kept.dispatch,
        workspace=kept.workspace,
        context=context,
        total=weights + gradients + optimizer + reserved + kept.largest + context,
    )


def micro_batch(config: RunConfig, world_size: int, imbalance: float, on_gpu: bool) -> MicroBatch:
    """What one process computes at a time."""
    training = config.training
    return MicroBatch(
        sequences=config.micro_batch(world_size),
        length=training.sequence_length // training.sequence_parallel,
        precision=training.precision,
        expert_parallel=training.expert_parallel,
        imbalance=imbalance,
        fused=on_gpu,
        checkpointing=training.activation_checkpointing,
    )


def buffers(zero_stage: int, precision: str, sizes: ModelSizes, expert_parallel: int) -> float:
    """A bucket through which gradients are reduced; at ZeRO 3 the gathered weights as well.

    ZeRO 1 in bf16 is another optimizer of DeepSpeed's, without a bucket.
    """
    if zero_stage == 1 and precision == "bf16":
        return 0.0
    size = BYTES[precision]
    return BUCKET * size + (gathered(sizes, expert_parallel, precision) if zero_stage == 3 else 0.0)


def gathered(sizes: ModelSizes, expert_parallel: int, precision: str) -> float:
    """Weights that ZeRO 3 holds in full at a time."""
    local = sizes.total - sizes.experts + sizes.experts / expert_parallel
    return min(LIVE, local) * BYTES[precision]
