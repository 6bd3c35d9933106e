"""The balance and z-loss that most routers offer, as options and as terms.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from s2moe.moe.routing import RoutingContext
from s2moe.objectives.balance import mean_probability, switch_balance_loss, z_loss
from s2moe.options import Checked, option
from s2moe.parallel.expert_parallel import all_reduce_sum


@dataclass(kw_only=True)
class BalanceOptions(Checked):
    """Options of routers that are balanced by Switch's loss; a router's own options subclass them."""

    balance_loss: float = option(0.01, "coefficient of the balance loss; 0 switches it off", least=0)
    balance_scope: str = option(
        "global",
        "over which tokens f is counted: global: the micro-batches of all ranks (local statistics over-regularise); "
        "local: this rank's micro-batch. Accumulated micro-batches are balanced one by one either way",
        choices=("global", "local"),
        needs="balance_loss",
    )
    z_loss: float = option(0.0, "coefficient of mean logsumexp(logits)^2 (ST-MoE: 1e-3)", least=0)


def balance_terms(
    options: BalanceOptions, logits_TE: Tensor, prob_TE: Tensor, load_E: Tensor, context: RoutingContext
) -> dict[str, Tensor]:
    """The raw balance loss E Σ f_i P_i and z-loss, those whose coefficient is not zero, by its name.

    Args:
        prob_TE: whose mean is P.
        load_E: this rank's counts of real tokens' choices, from which f is made.
    """
    losses = {}
    if options.balance_loss:
        losses["balance_loss"] = switch_balance_loss(
            global_load(options, load_E, context).to(prob_TE.dtype), mean_probability(prob_TE, context.mask_T)
        )
    if options.z_loss:
        losses["z_loss"] = z_loss(logits_TE, context.mask_T)
    return losses


def global_load(options: BalanceOptions, load_E: Tensor, context: RoutingContext) -> Tensor:
    """The load over the tokens that ``balance_scope`` names."""
    return all_reduce_sum(load_E, context.group if options.balance_scope == "global" else None)


def weigh(options: Any, raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Raw losses, named as their coefficients among ``options``: weighted for training, detached for the log."""
    losses = {name: getattr(options, name) * loss for name, loss in raw.items()}
    return losses, {name: loss.detach() for name, loss in raw.items()}
