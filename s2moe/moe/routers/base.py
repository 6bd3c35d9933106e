"""What every router is, and the registry that configuration names them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from s2moe.moe.routing import Routing, RoutingContext
from s2moe.precision import KeepsBuffers, linear

ROUTERS: dict[str, type[Router]] = {}


def register(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: make a router available as ``model.moe.router.name=<name>``."""

    def add(router: type[Router]) -> type[Router]:
        if name in ROUTERS:
            raise ValueError(f"two routers are called {name!r}: {ROUTERS[name]} and {router}")
        ROUTERS[name] = router
        return router

    return add


class Router(KeepsBuffers):
    """Decides which experts see a token, and with what weight.

    A subclass names its dataclass of options in ``Options`` and implements ``forward(hidden_TD,
    context) -> Routing``. It computes in float32 (``full_precision``) whatever the model's dtype.
    """

    Options: ClassVar[type[Any]]
    wants_attention: ClassVar[bool] = False  # whether context.attention is to be filled
    keeps_history: ClassVar[bool] = False  # whether context.history is to be filled in cached decoding
    # Whether it chooses by a token alone, wherever its sequence is: then sequences can be cut between processes.
    tokenwise: ClassVar[bool] = False
    frozen: bool = False  # see moe/freezing.py; ``after_step`` is not called then
    refuses_noise: ClassVar[str] = ""  # why S2MoE cannot use this router for its two passes; empty: it can

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: Any) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token must lie in 1..{num_experts}, got {experts_per_token}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.options = options

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        raise NotImplementedError

    def reset_parameters(self, std: float) -> None:
        """Initialise the parameters and buffers that are the router's own, not a submodule's."""

    def after_step(self, feedback: Tensor) -> None:
        """Called once after each optimizer step with the sum of ``Routing.feedback`` over micro-batches and ranks.

        Not called where the routing carried none. State that changes with training is changed here, never in
        ``forward``, which activation recomputation repeats.
        """

    def refuses_causal(self) -> str:
        """Why a causal model cannot use this router with its options; empty: it can."""
        return ""

    def add_tokens(self, rows: int) -> None:
        """The vocabulary grew to so many tokens: for a router that has something for each of them."""

    def expert_embeddings(self) -> Tensor | None:
        """A row for each expert by which tokens are scored, [E, any width], for the collapse metrics; None without."""
        scores = getattr(self, "scores", None)
        return scores.weight if isinstance(scores, LinearScores) else None

    def mean_choices(self, training: bool) -> float:
        """Experts of a token on average, over a run in training, else at inference: for counting FLOPs."""
        return float(self.experts_per_token)

    def macs_per_token(self) -> int:
        """Multiply-accumulates of scoring one token; here one for each number in the router's matrices."""
        return sum(tensor.numel() for tensor in [*self.parameters(), *self.buffers()] if tensor.dim() == 2)

    def choices(self, context: RoutingContext) -> int:
        """Experts per token now: the trained number, or the evaluation's own.

        Raises:
            ValueError: if the evaluation asks for more experts than there are.
        """
        choices = self.experts_per_token if context.experts_per_token is None else context.experts_per_token
        if not 1 <= choices <= self.num_experts:
            raise ValueError(f"experts_per_token must lie in 1..{self.num_experts}, got {choices}")
        return choices


class LinearScores(nn.Module):
    """Router logits h W^T, [T, E], in float32. ``zero`` starts W at zero."""

    def __init__(self, hidden_size: int, num_experts: int, zero: bool = False) -> None:
        super().__init__()
        self.zero = zero
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=0.0 if self.zero else std)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return linear(hidden_TD, self.weight)
