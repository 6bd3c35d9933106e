"""Whether a model's choices of experts stand clear of ties.

Two layouts, or two processors, round the same scores differently. Where two experts' scores are closer than that, they
choose differently and part from there: no tolerance on losses or weights covers it. A test that compares such
trainings in float32 first shows that its own data brings no tie near.

Legend: T tokens, D model, N assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import Routing, RoutingContext

MARGIN = 1e-4  # change of hidden states, relative to each number; layouts' own differ by some 1e-6 after a few steps

DRAWS = 8  # of data, until one has no tie

Mix = Callable[[Tensor, RoutingContext], tuple[Tensor, Routing, dict[str, Tensor]]]


def watch(model: nn.Module) -> list[bool]:
    """A list that gets, at every later pass through an SMoE layer, whether hidden states slightly off choose alike.

    For passes over whole sequences: the past in a cache is no part of the question.
    """
    clear: list[bool] = []
    for layer in model.modules():
        if isinstance(layer, SMoELayer):
            layer.mix = partial(_watched, layer, layer.mix, clear)  # type: ignore[method-assign]
    return clear


def _watched(layer: SMoELayer, mix: Mix, clear: list[bool], hidden_TD: Tensor, context: RoutingContext) -> Any:
    generator = torch.Generator().manual_seed(len(clear))
    move_TD = MARGIN * torch.randn(hidden_TD.shape, generator=generator)
    # What does not tip a near tie tips it in the opposite direction.
    one, other = (_choices(layer, mix, hidden_TD * (1 + sign * move_TD), context) for sign in (1, -1))
    clear.append(all(numbers_N.equal(others_N) for numbers_N, others_N in zip(one, other, strict=True)))
    return mix(hidden_TD, context)


def on_clear_data(train: Callable[[int], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The first seed of data whose training says that it was ``clear``, and that training's results."""
    for seed in range(1, DRAWS + 1):
        found = train(seed)
        if found["clear"]:
            return seed, found
    raise AssertionError(f"{DRAWS} draws of data all bring choices of experts near a tie")


def everywhere(condition: bool) -> bool:
    """Whether it holds on all ranks. Collective."""
    holds = torch.tensor(int(condition))
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


@torch.no_grad()
def _choices(layer: SMoELayer, mix: Mix, hidden_TD: Tensor, context: RoutingContext) -> list[Tensor]:
    """Tokens and experts of the assignments that the router made, and of the layer's own where those are others."""
    made: list[Routing] = []
    with layer.router.register_forward_hook(lambda _module, _given, routing: made.append(routing)):
        made.append(mix(hidden_TD, replace(context, first_pass={}, history=None))[1])
    return [numbers_N for routing in made for numbers_N in (routing.token_N, routing.expert_N)]
