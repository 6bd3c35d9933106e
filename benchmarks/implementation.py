"""What is timed: one layer, however it is made, behind one signature.

Legend: T tokens, D model, F hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

# [1, T, D] to the output [1, T, D], and an auxiliary loss (a scalar) or None.
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Weights(NamedTuple):
    """The parameters of a gated mixture, W2 (silu(W1 x) ⊙ W3 x), that every implementation is given."""

    router_ED: Tensor
    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor


@dataclass
class Implementation:
    """A layer ready to run.

    Attributes:
        module: holds the parameters, whose gradients are part of what is timed.
        reference: what its output must equal: "renormalised": Mixtral's mixture; "unnormalised": at
            k = 1 the same times the router's probability, as in Switch, since the renormalised weight of
            a single expert is 1 and would leave the router untrained; None: nothing, it is another function.
    """

    name: str
    module: nn.Module
    forward: Forward
    reference: str | None = None


class Unavailable(Exception):
    """An implementation that cannot run here, with the reason."""
