"""USMoE: tokens and experts compete for one budget of (token, expert) pairs.

Do, Le & Tran 2025, "Sparse Mixture of Experts as Unified Competitive Learning" (arXiv 2503.22996). With logits
L = X W^T over E experts, a token-choice and an expert-choice score are mixed, and the best pairs of a scope of
n tokens are taken, whoever's they are:

    f^t = softmax over experts of L          f^e = (2 / E) sigmoid(L)
    score = (1 - alpha) f^t + alpha f^e
    S = the c = n k best of the n E pairs,   y_t = Σ_{e: (t, e) in S} score_te E_e(x_t)

f^e stands for a softmax over tokens, which would look ahead, at the scale of f^t. A token may have no expert (the
residual stream carries it on) or all; k may be a fraction.

The scope is open: the paper's models for comparison without training take a sequence, its training code ranks
dimension 0 of time-major tensors, that is the sequences of a batch at each time step. Both are options, with the
whole micro-batch as a third. The default is a sequence, whose outputs do not depend on its batch.

Causality: none in training, where a later token may push out an earlier token's pair (scope=time_step is causal
over time, but couples the sequences of a batch). Inference is by threshold and causal: see competitive.py.

Legend: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2moe.moe.assignments import ragged
from s2moe.moe.balancing import BalanceOptions, balance_terms, weigh
from s2moe.moe.contest import SCOPES
from s2moe.moe.routers.base import register
from s2moe.moe.routers.competitive import CompetitiveOptions, CompetitiveRouter
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.options import option


@dataclass(kw_only=True)
class USMoEOptions(CompetitiveOptions, BalanceOptions):
    """Options of ``router.name: usmoe``."""

    scope: str = option(
        "sequence",
        "whose pairs compete in training: sequence: those of each sequence; token_batch: of this rank's micro-batch; "
        "time_step: of all sequences at each time step (the published training code)",
        choices=SCOPES,
    )
    alpha: float = option(
        0.5, "share of the expert-choice score; 0 leaves softmax alone (good: 0.3 to 0.7)", least=0, most=1
    )
    renormalise: bool = option(
        False, "divide a token's weights by the sum over its chosen experts (refused at a budget of 1 or less)"
    )
    balance_loss: float = option(0.0, "coefficient of Switch's balance loss, which USMoE does without", least=0)


@register("usmoe")
class USMoERouter(CompetitiveRouter):
    """The best pairs of a sequence in training, not causal; pairs above a running threshold at inference, causal."""

    Options = USMoEOptions
    options: USMoEOptions
    per_expert = False

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: USMoEOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        if options.renormalise and self.trained_budget <= 1:
            raise ValueError(
                "renormalise with a budget of at most one expert per token makes most weights 1, so the router would "
                "get little gradient from the task: set renormalise=false"
            )

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TE = self.scores(hidden_TD)
        prob_TE = logits_TE.softmax(-1)
        alpha = self.options.alpha
        score_TE = (1 - alpha) * prob_TE + alpha * (2 / self.num_experts) * logits_TE.sigmoid()
        chosen_TE, feedback, stats = self.choose(score_TE, context)
        weight_TE = score_TE
        if self.options.renormalise:
            sum_T1 = (score_TE * chosen_TE).sum(-1, keepdim=True)
            weight_TE = score_TE / torch.where(chosen_TE.any(-1, keepdim=True), sum_T1, 1.0)

        losses: dict[str, Tensor] = {}
        if self.training:
            # Where pairs compete, padding has none: this is the load of real tokens.
            raw = balance_terms(self.options, logits_TE, prob_TE, chosen_TE.sum(0), context)
            losses, figures = weigh(self.options, raw)
            stats = {**figures, **stats}
        return ragged(chosen_TE, weight_TE, prob_TE, context, losses, stats, feedback)
