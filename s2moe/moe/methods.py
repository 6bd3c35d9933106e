"""The published methods, each a name for a set of defaults: ``model.moe.method=<name>``."""

from __future__ import annotations

from typing import Any, NamedTuple


class Method(NamedTuple):
    """``summary`` is the line that ``--list-methods`` prints; ``settings`` are defaults below the user's own."""

    summary: str
    settings: dict[str, Any]


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
