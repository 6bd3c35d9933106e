"""The parallel shapes that a run could take on a cluster, each with memory and time, best first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from s2moe.config.options import ConfigError
from s2moe.config.run import RunConfig, check_world
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import ModelSizes, model_sizes

from .calibration import Efficiency
from .cost import StepTime, step_time
from .imbalance import Imbalance, simulate
from .machines import Machine
from .memory import Memory, memory


@dataclass(frozen=True)
class Cluster:
    """What the run is planned for.

    Args:
        load_cv: standard deviation of the experts' loads over their mean; see imbalance.py.
        imbalance: rows of the busiest rank over the mean that memory must hold; None: as simulated.
    """

    machine: Machine
    machines: int
    per_machine: int
    efficiency: Efficiency
    load_cv: float
    imbalance: float | None = None

    @property
    def world_size(self) -> int:
        return self.machines * self.per_machine


@dataclass(frozen=True)
class Shape:
    """A way to split the run. `refusal` says why it cannot be; then there is nothing else."""

    zero_stage: int
    expert_parallel: int
    micro_batch: int
    checkpointing: bool
    config: RunConfig | None = None
    memory: Memory | None = None
    time: StepTime | None = None
    imbalance: Imbalance | None = None
    fits: bool = False
    refusal: str = ""

    @property
    def tokens_per_second(self) -> float:
        if self.config is None or self.time is None:
            return 0.0
        training = self.config.training
        return training.global_batch * training.sequence_length / self.time.total

    def overrides(self) -> list[str]:
        """The settings that make a run take this shape."""
        return [
            f"training.zero_stage={self.zero_stage}",
            f"training.expert_parallel={self.expert_parallel}",
            f"training.micro_batch={self.micro_batch}",
            f"training.activation_checkpointing={str(self.checkpointing).lower()}",
        ]


def rank_shapes(config: RunConfig, model: S2MoEConfig, cluster: Cluster) -> list[Shape]:
    """Every shape: those that fit, fastest first, then those that do not, least memory first, then refused ones."""
    sizes = model_sizes(model)
    simulated: dict[tuple[int, int], Imbalance] = {}
    shapes = [
        _evaluate(shape, config, model, sizes, cluster, simulated) for shape in candidates(config, model, cluster)
    ]

    def order(shape: Shape) -> tuple[int, float]:
        if shape.memory is None:
            return 2, 0.0
        return (0, -shape.tokens_per_second) if shape.fits else (1, shape.memory.total)

    return sorted(shapes, key=order)


def refusals(shapes: Sequence[Shape]) -> list[str]:
    """Why shapes cannot be: each reason once, though its numbers differ from shape to shape."""
    kinds: dict[str, str] = {}
    for shape in shapes:
        if shape.refusal:
            kinds.setdefault(re.sub(r"\d+", "N", shape.refusal), shape.refusal)
    return list(kinds.values())


def require_possible(shapes: Sequence[Shape], config: RunConfig, cluster: Cluster) -> None:
    """Check that one shape at least can be dealt to the cluster's processes, whether or not it fits.

    Raises:
        ConfigError: none can; with the reasons, and the nearest number of processes that works.
    """
    if any(not shape.refusal for shape in shapes):
        return
    wanted = cluster.world_size
    near = sorted(range(1, 2 * wanted + 1), key=lambda number: abs(number - wanted))
    found = next((number for number in near if _takes(config, number)), None)
    remedy = f". The nearest number of processes that works is {found}" if found is not None else ""
    raise ConfigError(f"no shape is possible on {wanted} processes: {'; '.join(refusals(shapes))}{remedy}")


def _takes(config: RunConfig, world_size: int) -> bool:
    """Whether the run can be dealt to so many processes at all: one sequence at a time, every expert on each."""
    try:
        check_world(_with(config, Shape(1, 1, 1, False)), world_size)
    except ConfigError:
        return False
    return True


def candidates(config: RunConfig, model: S2MoEConfig, cluster: Cluster) -> Iterator[Shape]:
    """ZeRO stages, powers of two and the run's own numbers for the rest."""
    training, world = config.training, cluster.world_size
    degrees = set(_powers(min(world, model.moe_config().num_experts))) | {training.expert_parallel}
    micro_batches = set(_powers(max(1, training.global_batch * training.sequence_parallel // world))) | {
        training.micro_batch or 1
    }
    for stage in (1, 2, 3):
        for degree in sorted(degrees):
            for micro_batch in sorted(micro_batches):
                for checkpointing in (False, True):
                    yield Shape(stage, degree, micro_batch, checkpointing)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def _evaluate(
    shape: Shape,
    config: RunConfig,
    model: S2MoEConfig,
    sizes: ModelSizes,
    cluster: Cluster,
    simulated: dict[tuple[int, int], Imbalance],
) -> Shape:
    world = cluster.world_size
    try:
        config = _with(config, shape)
        check_world(config, world)
    except ConfigError as error:
        return replace(shape, refusal=str(error))
    key = (shape.expert_parallel, shape.micro_batch)
    if key not in simulated:
        simulated[key] = _imbalance(config, model, cluster)
    imbalance = simulated[key]
    on_gpu = cluster.machine.name != "cpu"
    needed = memory(config, model, sizes, world, cluster.imbalance or imbalance.peak, on_gpu)
    taken = step_time(config, model, sizes, cluster.machine, cluster.efficiency, imbalance, world, cluster.per_machine)
    fits = needed.fits(cluster.machine.memory)
    return replace(shape, config=config, memory=needed, time=taken, imbalance=imbalance, fits=fits)


def _with(config: RunConfig, shape: Shape) -> RunConfig:
    """The run in that shape. Raises ConfigError where its settings exclude it."""
    training = replace(
        config.training,
        zero_stage=shape.zero_stage,
        expert_parallel=shape.expert_parallel,
        micro_batch=shape.micro_batch,
        activation_checkpointing=shape.checkpointing,
    )
    return replace(config, training=training)


def _imbalance(config: RunConfig, model: S2MoEConfig, cluster: Cluster) -> Imbalance:
    moe, degree = model.moe_config(), config.training.expert_parallel
    sequences = config.micro_batch(cluster.world_size) * degree
    passes = 2 if moe.stochastic.enabled else 1
    return simulate(
        num_experts=moe.num_experts,
        expert_parallel=degree,
        groups=cluster.world_size // degree,
        layers=sum(moe.is_sparse(layer) for layer in range(model.num_hidden_layers)),
        micro_batches=config.accumulation_steps(cluster.world_size),
        assignments=sequences * config.training.sequence_length * moe.experts_per_token * passes,
        sequences=sequences,
        load_cv=cluster.load_cv,
    )
