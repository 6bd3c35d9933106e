"""The published methods, each a name for a set of defaults: ``model.moe.method=<name>``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A published method.

    ``summary`` is the line that ``--list-methods`` prints; ``settings`` are defaults below the user's own, or a
    function that makes them from the number of experts.
    """

    summary: str
    settings: dict[str, Any] | Callable[[int], dict[str, Any]]

    def defaults(self, num_experts: int) -> dict[str, Any]:
        """The settings for a layer of so many experts."""
        return self.settings(num_experts) if callable(self.settings) else self.settings


METHODS: dict[str, Method] = {
    "smoe": Method(
        "sparse mixture of experts: linear top-k routing with Switch's balance loss",
        {"router": {"name": "topk"}},
    ),
    "s2moe": Method(
        "S2MoE, flop-matched: one expert for each token and one for its noisy copy, gate, InfoNCE",
        {"experts_per_token": 1, "router": {"name": "topk"}, "stochastic": {"enabled": True}},
    ),
    "s2moe_k2": Method(
        "S2MoE with two experts on each of the two paths: twice the expert FLOPs of top-2 in training",
        {"experts_per_token": 2, "router": {"name": "topk"}, "stochastic": {"enabled": True}},
    ),
}
