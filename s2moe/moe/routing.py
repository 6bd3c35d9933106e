"""The two values a router deals in: what it is told, and what it answers.

Legend: T tokens, E experts, K choices per token, N assignments.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


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

    def for_copy(self) -> RoutingContext:
        """The context of a second pass over the same tokens, whose draws are independent of the first's."""
        return replace(self, copy=self.copy + 1)

    def generator(self, device: torch.device, purpose: str) -> torch.Generator:
        """A generator keyed by (seed, step, micro-batch, layer, purpose), the same at every call."""
        key = f"{self.seed}/{self.step}/{self.microbatch}/{self.layer}/{self.copy}/{purpose}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


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


def stack(first: Routing, second: Routing) -> Routing:
    """Route two batches of tokens as one: the second's tokens are numbered after the first's.

    Losses and statistics of the same name are averaged.
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
    )


class LayerStatistics(NamedTuple):
    """What one SMoE layer reports of a forward pass. ``loss`` alone carries a gradient."""

    layer: int
    loss: Tensor  # float32 scalar, the sum of the layer's weighted auxiliary losses
    counts_E: Tensor  # int64, the load: what this rank's real tokens asked of each expert in this micro-batch
    values: dict[str, Tensor]  # detached float32 scalars: raw losses and figures, by name
