"""How the gates of a token's chosen experts become weights, where a router leaves it open. topk has rules of its own.

    w_i = g_i                                    combine=gate
    w_i = g_i / Σ_{j ∈ A} g_j                    renormalise=true
    the value of the second, the gradient of the first      combine=straight_through

A the chosen experts of a token.

Legend: T tokens, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s2moe.options import Checked, option


@dataclass(kw_only=True)
class ShareOptions(Checked):
    """Options of routers whose weights may be made to sum to 1; a router's own options subclass them."""

    combine: str = option(
        "gate",
        "how gates become weights. gate: as they are (the paper); straight_through: each chosen gate's share of their "
        "sum, with the gradient of the gate itself, which k=1 leaves alive",
        choices=("gate", "straight_through"),
    )
    renormalise: bool = option(
        False, "divide a token's weights by their sum (refused at k=1: the router would get no gradient)"
    )


def require_gradient(options: ShareOptions, experts_per_token: int) -> None:
    """Raise ValueError if every weight would be constant, or two rules are given."""
    if options.renormalise and experts_per_token == 1:
        raise ValueError(
            "renormalise with experts_per_token=1 makes every weight 1, so the router would get no gradient from the "
            "task: set renormalise=false (or combine=straight_through instead)"
        )
    if options.renormalise and options.combine == "straight_through":
        raise ValueError(
            "straight_through weights sum to 1 already, and renormalising would change their gradient: set "
            "renormalise=false, or combine=gate"
        )


def weights_of(options: ShareOptions, gate_TK: Tensor, log_gate_TK: Tensor) -> Tensor:
    """The weights of the chosen gates.

    Args:
        log_gate_TK: their logarithms up to a constant of each token, so that gates too small for the dtype have shares.
    """
    if options.combine == "straight_through":
        return log_gate_TK.detach().softmax(-1) + (gate_TK - gate_TK.detach())
    return log_gate_TK.softmax(-1) if options.renormalise else gate_TK
