"""CompeteSMoE: now and then the experts themselves decide which of them a token belongs to.

Nguyen et al. 2025, "CompeteSMoE: Statistically Guaranteed Mixture of Experts Training via Competition", in the form of
its published code (version 2; version 1 of 2024, whose affinity is the norm of the outputs, is not offered). Most steps
are plain top-k routing. On a competition step of a layer all its experts process every token:

    a_i = mean_d softplus(E_i(x)_d)                                  affinity: how strongly expert i responds
    S = top-k of a,   y = Σ_{i in S} a_i / (Σ_{j in S} a_j) · E_i(x)      the winners share the output
    distillation = mean_i (p_i - q_i)² + θ mean_{i in S} (p_i - q_i)²,    p = softmax(x W_r), q = sg softmax(a)
    diversity = mean over i ≠ j in S of cos(E_i(x), E_j(x))
    balance = E Σ_i f_i P_i,   f_i the share of expert i in all S, P_i the mean of softmax(a)_i

There the router learns from the distillation alone: its own balance and z-loss belong to the steps on which it routes.
Public code divides the sum of the off-diagonal cosines by K² instead of K(K - 1), and its vision branch counts f from
the first expert only; neither is done here.

Which layers compete in a step is drawn from (seed, step) alone: all ranks, micro-batches, recomputations and resumed
runs agree. Each sparse layer does with probability ``rate``; where more than ``max_layers`` would, so many of them do,
any as likely as another. (Public code moves the others to neighbouring steps of a plan drawn in advance.)

A competition step costs E/k times the experts' work of another, and holds the outputs of all T E pairs of token and
expert at once: until the backward pass 2 D + 2 F numbers a pair (gated experts; mlp: 2 D + F), and in half precision
the outputs once more in float32. With activation checkpointing one layer at a time does.

k = 1: the weight a / a is constant, so that the task trains the winner, but not which one wins. The router is not
starved, as it would be by such a weight of its own: it learns from the distillation. But 1 is not the scale of a
router whose weight is a probability; ``combine: softmax`` takes the weights from softmax(a) instead, at any k.

Inference is the plain router. Causal, in training too: a token's competition is its own.

Legend: T tokens, D model, F hidden, E experts, K choices per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from s2moe.moe.assignments import all_pairs, load_of, per_token
from s2moe.moe.balancing import global_load, weigh
from s2moe.moe.config import CompetitionOptions, MoEConfig
from s2moe.moe.dispatch import expert_outputs
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routers.topk import TopKRouter
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.objectives.balance import masked_mean, mean_probability, switch_balance_loss
from s2moe.objectives.competition import distillation_loss, diversity_loss
from s2moe.parallel import ExpertParallel
from s2moe.precision import full_precision

LOSSES = ("distillation_loss", "diversity_loss", "affinity_balance_loss")  # each with a coefficient of its name


def competing_layers(config: MoEConfig, context: RoutingContext) -> set[int]:
    """The layers that hold a competition at ``context.step``: the same whatever rank, micro-batch or layer asks."""
    options = config.competition
    if options.warm_up:
        steps = context.total_steps(options.schedule_steps, "competition.warm_up")
        if context.step < int(options.warm_up * steps):
            return set()
    layers = max(context.layers, context.layer + 1)  # a layer without a model counts as the last one
    sparse = [layer for layer in range(layers) if config.is_sparse(layer)]
    draws = torch.rand(len(sparse), generator=context.shared_generator("competition", layer=-1)).tolist()
    lowest = sorted(zip(draws, sparse, strict=True))[: options.max_layers]
    return {layer for draw, layer in lowest if draw < options.rate}


class CompetitiveSMoELayer(SMoELayer):
    """CompeteSMoE with a linear top-k router. The plain SMoE layer in evaluation."""

    router: TopKRouter

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config, hidden_size, layer, parallel)
        self.options: CompetitionOptions = config.competition
        self.losses = [name for name in LOSSES if getattr(self.options, name)]

    def mix(self, hidden_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing, dict[str, Tensor]]:
        if self.training and self.layer in competing_layers(self.config, context):
            return self._compete(hidden_TD, context)
        out_TD, routing, values = super().mix(hidden_TD, context)
        if self.training:  # the figures of a competition, at every step
            zero = torch.zeros((), device=hidden_TD.device)
            values = {**values, **dict.fromkeys(("competing", "router_agreement", *self.losses), zero)}
        return out_TD, routing, values

    def _compete(self, hidden_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing, dict[str, Tensor]]:
        tokens, num_experts = len(hidden_TD), self.router.num_experts
        # The router's own choice is followed by its figures and by the feedback for its selection bias. Its logits
        # are computed once more for the distillation: little, beside all the experts.
        routed = self.router(hidden_TD, context)
        logits_TE = self.router.scores(hidden_TD)

        pairs = all_pairs(tokens, num_experts, hidden_TD.device)
        out_ND = expert_outputs(hidden_TD, pairs, self.experts, self.parallel, self.dropout_key(context))
        out_TED = out_ND.view(tokens, num_experts, -1)
        affinity_TE = F.softplus(full_precision(out_TED)).mean(-1)
        prob_TE = affinity_TE.softmax(-1)
        winner_TK = affinity_TE.detach().topk(self.router.choices(context), dim=-1).indices
        weight_TK = (prob_TE if self.options.combine == "softmax" else affinity_TE).gather(-1, winner_TK)
        if self.options.combine == "normalised":
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        won_TKD = out_TED.gather(1, winner_TK[..., None].expand(-1, -1, out_TED.shape[-1]))
        out_TD = (weight_TK[..., None] * won_TKD).sum(1).to(out_TED.dtype)

        load_E = load_of(winner_TK, num_experts, context.mask_T)
        losses, stats = weigh(self.options, self._losses(logits_TE, prob_TE, winner_TK, won_TKD, load_E, context))
        # Each parameter of the router gets a gradient at every step, if only zero: where one is missing, ZeRO-3 applies
        # that of the step before again.
        losses["no_loss"] = 0 * (routed.weight_N.sum() + logits_TE.sum())
        assert routed.prob_TE is not None
        routing = per_token(
            winner_TK, weight_TK, routed.prob_TE, context, losses, routed.stats, load_E, routed.feedback
        )
        if context.probe is not None:
            context.probe.record(self, hidden_TD, routing, context)
        values = self.regularise(hidden_TD, routing, None, context, routing.losses)
        values["competing"] = torch.ones((), device=hidden_TD.device)
        values["router_agreement"] = self._agreement(logits_TE, winner_TK, context.mask_T)
        return out_TD, routing, {**values, **stats}

    def _losses(
        self,
        logits_TE: Tensor,
        prob_TE: Tensor,
        winner_TK: Tensor,
        won_TKD: Tensor,
        load_E: Tensor,
        context: RoutingContext,
    ) -> dict[str, Tensor]:
        """The raw losses whose coefficient is not zero, by the name of that coefficient."""
        mask_T, losses = context.mask_T, {}
        if "distillation_loss" in self.losses:
            losses["distillation_loss"] = distillation_loss(
                logits_TE.softmax(-1), prob_TE, winner_TK, self.options.theta, mask_T
            )
        if "diversity_loss" in self.losses:
            losses["diversity_loss"] = diversity_loss(won_TKD, mask_T)
        if "affinity_balance_loss" in self.losses:
            load_E = global_load(self.router.options, load_E, context)
            losses["affinity_balance_loss"] = switch_balance_loss(
                load_E.to(prob_TE.dtype), mean_probability(prob_TE, mask_T)
            )
        return losses

    @staticmethod
    @torch.no_grad()
    def _agreement(logits_TE: Tensor, winner_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        """The share of a token's winners that are among the k experts of the highest logits."""
        routed_TK = logits_TE.topk(winner_TK.shape[1], dim=-1).indices
        both_TK = (winner_TK[:, :, None] == routed_TK[:, None, :]).any(-1)
        return masked_mean(both_TK.to(logits_TE.dtype).mean(-1), mask_T)
