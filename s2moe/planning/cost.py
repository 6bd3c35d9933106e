"""The time of a step: a stated model, simple enough to argue with.

    micro-batch = max(device, host)
    device      = dense FLOPs / (peak x efficiency) + expert FLOPs / (peak x efficiency x fill) x slowest rank
                  + memory traffic / bandwidth + all-to-alls x slowest rank
    host        = time to queue the kernels of all layers
    step        = micro-batches x micro-batch + ZeRO's collectives that nothing hides + optimizer

fill = m / (m + HALF_FILLED) for m rows an expert: small matrices leave a GPU half idle. The slowest rank comes from
imbalance.py, collectives from communication.py, efficiencies from calibration.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from s2moe.config.run import RunConfig
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import ModelSizes
from s2moe.training.plan import BYTES

from .activations import activations
from .calibration import Efficiency
from .communication import Communication, communication
from .imbalance import Imbalance
from .machines import Machine
from .memory import micro_batch

HALF_FILLED = {True: 128.0, False: 0.0}  # rows an expert; a CPU has no such threshold
PASSES_OVER_ACTIVATIONS = 3.0  # written once, read once, and their gradient written
HIDDEN_BY_COMPUTATION = {1: 0.0, 2: 0.0, 3: 0.5}  # of ZeRO's collectives; only stage 3 overlaps them by default
OPTIMIZER_TRAFFIC = 30.0  # bytes read and written for each parameter that a process updates
OFFLOADED_TRAFFIC, HOST_LINK, HOST_MEMORY = 6.0, 25e9, 20e9  # gradient there and weight back over PCIe; a GPU's share


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by kind, with the mean of the slowest rank; `p95` is the whole step's 95th percentile."""

    dense: float
    experts: float
    memory: float
    host: float  # beyond what the device takes
    all_to_all: float
    zero: float
    optimizer: float
    p95: float
    communication: Communication

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.memory + self.host + self.all_to_all + self.zero + self.optimizer


def flops(config: RunConfig, model: S2MoEConfig, sizes: ModelSizes, tokens: int) -> tuple[float, float]:
    """FLOPs of `tokens` tokens, forward and backward, without recomputation: of the experts, of the rest."""
    total = sizes.flops_per_token(config.training.sequence_length) * tokens
    moe = model.moe_config()
    sparse = sum(moe.is_sparse(layer) for layer in range(model.num_hidden_layers))
    matrices = 3 if moe.expert_form == "gated" else 2
    passes = 2 if moe.stochastic.enabled else 1
    macs = sparse * passes * moe.experts_per_token * matrices * model.hidden_size * moe.expert_hidden
    experts = min(float(6 * macs * tokens), float(total))
    return experts, total - experts


def step_time(
    config: RunConfig,
    model: S2MoEConfig,
    sizes: ModelSizes,
    machine: Machine,
    efficiency: Efficiency,
    imbalance: Imbalance,
    world_size: int,
    per_machine: int,
) -> StepTime:
    """Of one optimizer step on `world_size` processes, `per_machine` of them in each machine."""
    training, moe = config.training, model.moe_config()
    micro_batches = config.accumulation_steps(world_size)
    micro = micro_batch(config, world_size, 1.0, on_gpu=machine.name != "cpu")
    repeated = 4 / 3 if training.activation_checkpointing else 1.0
    expert_flops, other_flops = flops(config, model, sizes, micro.tokens)

    peak = machine.peak(training.precision)
    rows = micro.tokens * moe.experts_per_token * (2 if moe.stochastic.enabled else 1)
    rows_an_expert = rows * training.expert_parallel / moe.num_experts
    fill = rows_an_expert / (rows_an_expert + HALF_FILLED[machine.name != "cpu"])
    dense = repeated * other_flops / (peak * efficiency.dense)
    experts = repeated * expert_flops / (peak * efficiency.experts * fill)

    full = activations(model, micro)  # with checkpointing, all of it still passes through memory
    kept = full.kept + full.logits + model.num_hidden_layers * full.recomputed
    weights = (sizes.total - sizes.experts + sizes.experts / training.expert_parallel) * BYTES[training.precision]
    traffic = repeated * (PASSES_OVER_ACTIVATIONS * kept + 3 * weights) / machine.memory_bandwidth

    sent = communication(config, model, sizes, machine, world_size, per_machine)
    exchange = sent.all_to_all_seconds / micro_batches
    zero = sent.zero_seconds * (1 - HIDDEN_BY_COMPUTATION[training.zero_stage])
    updated = sizes.total / world_size
    optimizer = updated * OPTIMIZER_TRAFFIC / machine.memory_bandwidth
    if training.offload_optimizer:
        optimizer = updated * (OFFLOADED_TRAFFIC / HOST_LINK + OPTIMIZER_TRAFFIC / HOST_MEMORY)
    host = repeated * model.num_hidden_layers * machine.host_seconds_per_layer

    def whole(slowest: float) -> float:
        device = dense + traffic + (experts + exchange) * slowest
        return micro_batches * max(device, host) + zero + optimizer

    device = dense + traffic + (experts + exchange) * imbalance.mean
    return StepTime(
        dense=micro_batches * dense,
        experts=micro_batches * experts * imbalance.mean,
        memory=micro_batches * traffic,
        host=micro_batches * max(0.0, host - device),
        all_to_all=micro_batches * exchange * imbalance.mean,
        zero=zero,
        optimizer=optimizer,
        p95=whole(imbalance.p95),
        communication=sent,
    )
