"""Ulysses sequence parallelism: consecutive ranks hold parts of the same sequences, so that long ones fit.

Everything but attention works token by token, and does not know; to the engine each part is a micro-batch of its
own, as long as all parts have equally many tokens. Attention exchanges tokens for heads before, and back after: each
rank attends over whole sequences with its share of the heads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from s2moe.models import S2MoEForCausalLM
from s2moe.parallel.deepspeed_compat import ulysses_attention

NAME = "ulysses"


@dataclass(frozen=True)
class SequencePart:
    """Which sequences a rank works on, and which part of them: rank ``rank`` of ``size`` among its group."""

    size: int
    rank: int
    group: int  # number of its sequences' ranks among ``groups``
    groups: int

    @classmethod
    def of(cls, rank: int, world_size: int, size: int) -> SequencePart:
        return cls(size, rank % size, rank // size, world_size // size)

    def cut(self, tokens_BS: Tensor) -> Tensor:
        """This part's columns."""
        return tokens_BS.chunk(self.size, dim=1)[self.rank].contiguous()

    def positions(self, sequence_length: int, device: torch.device) -> Tensor:
        """Of this part's tokens within their sequences, [1, S / size]."""
        return self.cut(torch.arange(sequence_length, device=device)[None])


def spread_sequences(model: S2MoEForCausalLM, size: int, micro_batch: int, sequence_length: int) -> None:
    """Let the model's attention in training run over the sequence-parallel group of ``size`` ranks. Collective.

    In evaluation every rank attends to its own sequences.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    config = copy.copy(model.config)  # the model's own stays what it is: masks and export go by it
    ulysses_attention(NAME, config, groups[rank // size], micro_batch, sequence_length)
    config._attn_implementation = NAME
    for layer in model.model.layers:
        cast(Any, layer.attention).config = config
