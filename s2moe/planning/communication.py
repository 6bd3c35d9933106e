"""Bytes that one process sends in a step, and the time of collectives on a hierarchy of links.

A collective's time is what goes over the links within machines, plus what goes between machines, each over its
bandwidth, plus a latency a message (alpha-beta). Ranks are dealt machine by machine, so an expert-parallel group
is a run of neighbours, and the copies of an expert are as far apart as the group is large.
"""

from __future__ import annotations

from dataclasses import dataclass

from s2moe.config.run import RunConfig
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import ModelSizes
from s2moe.training.plan import BYTES

from .machines import Machine
from .memory import BUCKET

REACHED = 0.8  # of a link's bandwidth by a collective of large messages


@dataclass(frozen=True)
class Group:
    """Processes of a collective: `size` of them, `together` in each machine."""

    size: int
    together: int

    @property
    def machines(self) -> int:
        return -(-self.size // self.together)


@dataclass(frozen=True)
class Volume:
    """Bytes that one process sends in an optimizer step; for all-to-alls the mean over processes."""

    all_to_all: float  # rows to experts and back
    sequence: float  # sequence parallelism: tokens exchanged for heads and back
    dense_reduce: float  # gradients of what all processes share
    dense_gather: float  # its weights
    expert_reduce: float
    expert_gather: float

    @property
    def total(self) -> float:
        return sum(self.__dict__.values())


@dataclass(frozen=True)
class Communication:
    """Volume of a step, and its seconds where loads are even."""

    volume: Volume
    all_to_all_seconds: float
    zero_seconds: float


def expert_group(expert_parallel: int, per_machine: int) -> Group:
    """The processes that share one copy of the experts."""
    return Group(expert_parallel, min(expert_parallel, per_machine))


def copies_group(world_size: int, expert_parallel: int, per_machine: int) -> Group:
    """The processes that hold the same experts."""
    size = world_size // expert_parallel
    return Group(size, min(size, max(1, per_machine // expert_parallel)))


def ring_seconds(sent: float, group: Group, machine: Machine, messages: float = 1.0) -> float:
    """Of reduce-scatters or all-gathers in which each process sends `sent` bytes, in so many `messages`."""
    if group.size == 1:
        return 0.0
    whole = sent * group.size / (group.size - 1)
    within = whole * (group.together - 1) / group.together / (REACHED * machine.link)
    machines = group.machines
    between = whole * (machines - 1) / machines / group.together / (REACHED * machine.network)
    latency = (group.together - 1) * machine.link_latency + (machines - 1) * machine.network_latency
    return within + between + messages * latency


def all_to_all_seconds(sent: float, group: Group, machine: Machine) -> float:
    """Of an all-to-all in which each process sends `sent` bytes, its own part not counted."""
    if group.size == 1:
        return 0.0
    others = group.size - 1
    within = sent * (group.together - 1) / others / (REACHED * machine.link)
    between = sent * (group.size - group.together) / others / (REACHED * machine.network)
    latency = (machine.link_latency if group.together > 1 else 0.0) + (group.machines - 1) * machine.network_latency
    return within + between + latency


def communication(
    config: RunConfig, model: S2MoEConfig, sizes: ModelSizes, machine: Machine, world_size: int, per_machine: int
) -> Communication:
    """What a step sends, and for how long."""
    training, moe = config.training, model.moe_config()
    micro_batches = config.accumulation_steps(world_size)
    size = BYTES[training.precision]

    sparse = sum(moe.is_sparse(layer) for layer in range(model.num_hidden_layers))
    tokens = config.micro_batch(world_size) * training.sequence_length // training.sequence_parallel
    assignments = tokens * moe.experts_per_token * (2 if moe.stochastic.enabled else 1)
    group = expert_group(training.expert_parallel, per_machine)
    one = assignments * model.hidden_size * size * (group.size - 1) / group.size
    # There and back, forward and backward; recomputation repeats the forward.
    exchanges = (6 if training.activation_checkpointing else 4) * sparse * micro_batches
    headers = exchanges / 2 * (machine.link_latency + (group.machines - 1) * machine.network_latency)
    exchange_seconds = exchanges * all_to_all_seconds(one, group, machine) + (headers if group.size > 1 else 0.0)

    spread, heads = training.sequence_parallel, model.attention_shape()
    widths = 2 * (heads.query_heads + heads.value_heads) * heads.width  # query, key, value, and the output
    passes = (3 if training.activation_checkpointing else 2) * model.num_hidden_layers * micro_batches
    sequence = passes * tokens * widths * size * (spread - 1) / spread
    together = Group(spread, min(spread, per_machine))
    exchange_seconds += 4 * passes * all_to_all_seconds(sequence / (4 * passes), together, machine)

    seconds, sent = 0.0, []
    local_experts = sizes.experts / training.expert_parallel
    for parameters, copies in (
        (float(sizes.total - sizes.experts), Group(world_size, min(world_size, per_machine))),
        (local_experts, copies_group(world_size, training.expert_parallel, per_machine)),
    ):
        share = parameters * (copies.size - 1) / copies.size
        reduced, gathered = _zero(training.zero_stage, training.precision, share, micro_batches)
        sent += [reduced, gathered]
        buckets = -(-parameters // BUCKET)
        if training.zero_stage == 3:  # layer by layer, forward and backward
            counts = (buckets * micro_batches, 2.0 * model.num_hidden_layers * micro_batches)
        else:
            counts = (buckets * (micro_batches if training.zero_stage == 2 else 1), buckets)
        seconds += ring_seconds(reduced, copies, machine, counts[0]) + ring_seconds(
            gathered, copies, machine, counts[1]
        )
    return Communication(Volume(exchanges * one, sequence, *sent), exchange_seconds, seconds)


def _zero(stage: int, precision: str, share: float, micro_batches: int) -> tuple[float, float]:
    """Bytes sent in a step to reduce gradients and to gather weights.

    Stage 1 reduces once a step, in the precision that gradients are added up in, the others after every
    micro-batch; 1 and 2 by an all-reduce, which sends twice as much as a reduce-scatter. Stage 3 gathers the
    weights before forward and backward of every micro-batch, the others after the step.
    """
    size = BYTES[precision]
    if stage == 1:
        return 2 * share * (4 if precision == "bf16" else size), share * size
    if stage == 2:
        return 2 * share * size * micro_batches, share * size
    return share * size * micro_batches, 2 * share * size * micro_batches
