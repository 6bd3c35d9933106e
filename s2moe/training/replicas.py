"""What processes hold in common must be equal, to the bit, when a checkpoint is written.

A memory error, a collective that went wrong or a process with another program would otherwise be saved
and trained on. Compared is one number a tensor, the sum of its bits: the weights are read once and a few
bytes travel, which costs less than a training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2moe.parallel import deepspeed_compat

from .checkpoint import TrainingState
from .errors import TrainingError, remains
from .export import expert_parameters
from .ranks import gather

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Shared:
    """Tensors that the ranks of `group` hold alike."""

    names: list[str]
    tensors: list[Tensor]
    group: Any


def require_equal_replicas(module: nn.Module, state: TrainingState, saved: int | None = None) -> None:
    """Raise TrainingError on every process unless all hold the same position, weights and buffers. Collective.

    `saved` is the step of the newest complete checkpoint, for the message.

    Slices of ZeRO-3 and experts that one process alone holds have no replica to be compared with.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    device = next(module.parameters()).device
    position = torch.tensor([state.step, state.samples, state.tokens], device=device)
    found = _different(["step", "samples", "tokens"], position, dist.group.WORLD)
    for shared in _shared(module):
        sums = torch.stack([bit_sum(tensor) for tensor in shared.tensors])
        found += _different(shared.names, sums, shared.group)
    first = next((text for of_rank in gather(found) for text in of_rank), None)
    if first is not None:
        raise TrainingError(
            f"processes have diverged at step {state.step}: {first}. No checkpoint was written; {remains(saved)}. "
            "If it happens again, the rank's memory or network is faulty: leave its machine out"
        )


def bit_sum(tensor: Tensor) -> Tensor:
    """The tensor's bits, read as integers of its width, added up in int64 (which may wrap around)."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGER[flat.element_size()]).sum(dtype=torch.int64)


def _shared(module: nn.Module) -> list[_Shared]:
    experts = expert_parameters(module)
    named: dict[str, Tensor] = dict(module.named_parameters())
    common = {name: tensor for name, tensor in named.items() if name not in experts and not hasattr(tensor, "ds_id")}
    common |= {name: buffer for name, buffer in module.named_buffers() if buffer.numel()}
    shared = []
    if common:
        shared.append(_Shared(list(common), list(common.values()), dist.group.WORLD))
    spread = {name: named[name] for name in experts if not hasattr(named[name], "ds_id")}
    if spread:
        group = deepspeed_compat.expert_replicas(module)
        if dist.get_world_size(group) > 1:
            shared.append(_Shared(list(spread), list(spread.values()), group))
    return shared


def _different(names: list[str], numbers: Tensor, group: Any) -> list[str]:
    """Which of the numbers differ within the group, and on which ranks. Collective over the group."""
    # One all-reduce where all is well: the largest of x and of not x; they are complements where all are equal.
    both = torch.stack([numbers, ~numbers])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    if torch.equal(both[0], ~both[1]):
        return []
    every = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, numbers, group=group)
    table = torch.stack(every)
    column = int((table != table[0]).any(0).nonzero()[0])
    ranks, found = dist.get_process_group_ranks(group), table[:, column].tolist()
    usual = max(found, key=found.count)
    odd = [str(rank) for rank, number in zip(ranks, found, strict=True) if number != usual]
    if 2 * len(odd) >= len(ranks):
        return [f"{names[column]} is not the same on rank {', '.join(map(str, ranks))}"]
    return [f"{names[column]} of rank {', '.join(odd)} is not that of the other {len(ranks) - len(odd)} ranks"]
