"""The two values a router deals in: what it is told, and what it answers.

Legend: B sequences, S tokens of each, T = B S tokens, E experts, K choices per token, N assignments,
L positions that a token may look back on (cached ones included), H heads, G key/value heads, C head width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from s2moe.moe.history import History
    from s2moe.moe.layer import SMoELayer


class AttentionState(NamedTuple):
    """What the attention before an SMoE layer computed; handed on to routers that ask for it (``wants_attention``)."""

    query_BHSC: Tensor  # with rotary positions
    key_BGLC: Tensor  # with rotary positions, cached ones included
    value_BGLC: Tensor
    out_BSHC: Tensor  # each head's output, before the output projection
    scaling: float  # factor of query · key


class Probe(Protocol):
    """Looks into layers for the collapse metrics: see training/probe.py."""

    def record(self, layer: SMoELayer, hidden_TD: Tensor, routing: Routing, context: RoutingContext) -> None:
        """Called by every SMoE layer with the (clean) hidden states that enter it and their routing."""


@dataclass(frozen=True)
class RoutingContext:
    """What a router may need beyond the hidden states. Passed down explicitly, never through globals.

    ``step`` and ``microbatch`` (the global index of the micro-batch within the step: accumulation
    index x data-parallel size + rank) key everything random in a layer, so that activation
    recomputation repeats it, a resumed run repeats it, and two ranks with one micro-batch each
    draw what one process with two would.
    """

    seed: int = 0
    step: int = 0
    microbatch: int = 0
    layer: int = 0
    copy: int = 0  # 1 for S2MoE's noisy pass over the same tokens
    experts_per_token: int | None = None  # k' of a slimmed evaluation; None keeps the trained k
    mask_T: Tensor | None = None  # False for padding, which takes no part in losses and statistics
    sequences: int = 1  # the T tokens are this many equally long sequences, one after another
    group: ProcessGroup | None = None  # ranks whose micro-batches form the global batch
    steps: int = 0  # optimizer steps of the whole run, for schedules; 0: not known
    epoch: int = 0  # passes over the training images that are done; text counts none
    layers: int = 1  # blocks of the model, of which this is number ``layer``
    token_T: Tensor | None = None  # int64 ids of the tokens; None where embeddings were given instead
    target_T: Tensor | None = None  # int64 ids to be predicted, -100 where there is none; None without labels
    attention: AttentionState | None = None  # of this block, for routers with ``wants_attention``
    attention_mask: Tensor | None = None  # as the model was given it: [B, L] or [B, 1, S, L]; see moe/history.py
    history: History | None = None  # earlier positions in cached decoding, for routers with ``keeps_history``
    probe: Probe | None = None
    # What a router's first pass over the tokens leaves for a second (S2MoE's), by name; new in every layer.
    first_pass: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device, non_blocking: bool = False) -> RoutingContext:
        """With its tensors on ``device``: accelerate calls it where a model's blocks are on several."""
        names = ("mask_T", "token_T", "target_T", "attention_mask")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in given.items()})

    def for_copy(self) -> RoutingContext:
        """The context of a second pass over the same tokens, whose draws are independent of the first's."""
        return replace(self, copy=self.copy + 1)

    def generator(self, device: torch.device, purpose: str) -> torch.Generator:
        """A generator keyed by (seed, step, micro-batch, layer, purpose), the same at every call."""
        return _generator(device, self.seed, self.step, self.microbatch, self.layer, self.copy, purpose)

    def shared_generator(self, purpose: str, layer: int | None = None) -> torch.Generator:
        """A CPU generator keyed by (seed, step, layer, purpose) alone: for decisions in which all ranks agree.

        Args:
            layer: instead of the context's own; -1, say, for what all layers decide together.
        """
        layer = self.layer if layer is None else layer
        return _generator(torch.device("cpu"), self.seed, self.step, "all", layer, purpose)

    def dropout_seed(self) -> int:
        """For torch's own generator, which dropout draws from: keyed by (seed, step, micro-batch)."""
        return _seed("dropout", self.seed, self.step, self.microbatch)

    def total_steps(self, given: int | None, what: str) -> int:
        """The run's steps: as an option gives them, or the trainer.

        Raises:
            ValueError: if neither does.
        """
        steps = given or self.steps
        if steps < 1:
            raise ValueError(
                f"{what} needs the number of training steps: pass context=RoutingContext(step=..., steps=...) to the "
                "model, or set the router's option schedule_steps"
            )
        return steps


def _generator(device: torch.device, *key: object) -> torch.Generator:
    return torch.Generator(device).manual_seed(_seed(*key))


def _seed(*key: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Routing(NamedTuple):
    """A router's answer: a ragged list of assignments, and what it cost.

    A named tuple, because ZeRO-3 finds the tensors of a module's output only in tuples, lists and
    dictionaries.
    """

    token_N: Tensor  # int64, ascending: assignments are listed token by token
    expert_N: Tensor  # int64, global expert ids
    weight_N: Tensor  # float32, the factor of each expert's output; carries the router's gradient
    counts_E: Tensor  # int64, assignments of each expert in this list
    load_E: Tensor  # int64, what real tokens (not padding) asked of each expert, before any was dropped
    losses: dict[str, Tensor]  # weighted auxiliary losses, float32 scalars: their sum is to be minimised
    stats: dict[str, Tensor]  # detached float32 scalars for the log
    num_tokens: int
    choices: int | None  # K where every token has exactly K assignments, None where the list is ragged
    prob_TE: Tensor | None = None  # float32, the router's distribution over experts: rows sum to 1
    feedback: Tensor | None = None  # detached: summed over a step's micro-batches and ranks for ``Router.after_step``


def stack(first: Routing, second: Routing) -> Routing:
    """Route two batches of tokens as one: the second's tokens are numbered after the first's.

    Losses and statistics of the same name are averaged, the feedback is summed. The distribution is the first's.
    """
    return Routing(
        token_N=torch.cat((first.token_N, second.token_N + first.num_tokens)),
        expert_N=torch.cat((first.expert_N, second.expert_N)),
        weight_N=torch.cat((first.weight_N, second.weight_N)),
        counts_E=first.counts_E + second.counts_E,
        load_E=first.load_E + second.load_E,
        losses={name: (loss + second.losses[name]) / 2 for name, loss in first.losses.items()},
        stats={name: (value + second.stats[name]) / 2 for name, value in first.stats.items()},
        num_tokens=first.num_tokens + second.num_tokens,
        choices=first.choices if first.choices == second.choices else None,
        prob_TE=first.prob_TE,
        feedback=first.feedback if second.feedback is None else _sum(first.feedback, second.feedback),
    )


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second


class LayerStatistics(NamedTuple):
    """What one SMoE layer reports of a forward pass. ``loss`` alone carries a gradient."""

    layer: int
    loss: Tensor  # float32 scalar, the sum of the layer's weighted auxiliary losses
    counts_E: Tensor  # int64, the load: what this rank's real tokens asked of each expert in this micro-batch
    values: dict[str, Tensor]  # detached float32 scalars: raw losses and figures, by name, the same at every step
    feedback: Tensor | None = None  # see Routing
