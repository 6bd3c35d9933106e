"""S-BASE: experts by a balanced transport plan in training, weights from the raw logits.

Clark et al. 2022, "Unified Scaling Laws for Routed Language Models", in the form that Megatron-LM trains:

    L = h W_rᵀ
    Π = argmax ⟨Π, L⟩ − ξ ⟨Π, log Π⟩  with balanced marginals (moe/transport.py), without gradient
    A_t = the k experts of highest Π_ti in training,  of highest L_ti in evaluation
    g_ti = σ(L_ti)            k = 1
    g_ti = softmax(L_t)_i     k > 1, over all experts, not renormalised
    y_t = Σ_{i ∈ A_t} g_ti · expert_i(h_t)

With ``renormalise`` or ``combine=straight_through`` a token's g sum to 1 (moe/shares.py).

The rule for g is that of the trained k, also where an evaluation takes another number of experts. The plan does
the balancing; a balance loss would pull at the logits for nothing, so none is offered.

ξ is 1 in Megatron-LM, which exponentiates the logits as they are.

Causality: in training a token's experts depend on the whole micro-batch (of all ranks with marginals=global), later
tokens included. Inference is plain top-k, each token on its own; its load is whatever the logits make of it.

Legend: T tokens, D model, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s2moe.moe.assignments import per_token
from s2moe.moe.routers.base import LinearScores, Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.shares import ShareOptions, require_gradient, weights_of
from s2moe.moe.transport import TransportOptions, column_error, sinkhorn
from s2moe.options import option


@dataclass(kw_only=True)
class SBaseOptions(TransportOptions, ShareOptions):
    """Options of ``router.name: sbase``."""

    entropy: float = option(
        1.0, "xi, the weight of the plan's entropy: smaller balances the choices more strictly", above=0
    )


@register("sbase")
class SBaseRouter(Router):
    """Top-k of a balanced plan in training, plain top-k in evaluation, which is causal: see the module."""

    Options = SBaseOptions
    options: SBaseOptions

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: SBaseOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        require_gradient(options, experts_per_token)
        self.scores = LinearScores(hidden_size, num_experts)

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices = self.choices(context)
        logits_TE = self.scores(hidden_TD)
        prob_TE = logits_TE.softmax(-1)
        score_TE, stats = self._balanced(logits_TE.detach(), context) if self.training else (logits_TE.detach(), {})
        expert_TK = score_TE.topk(choices, dim=-1).indices
        softmax = self.experts_per_token > 1
        gate_TE, log_gate_TE = (prob_TE, logits_TE) if softmax else (logits_TE.sigmoid(), F.logsigmoid(logits_TE))
        weight_TK = weights_of(self.options, gate_TE.gather(-1, expert_TK), log_gate_TE.gather(-1, expert_TK))
        return per_token(expert_TK, weight_TK, prob_TE, context, stats=stats)

    @torch.no_grad()
    def _balanced(self, logits_TE: Tensor, context: RoutingContext) -> tuple[Tensor, dict[str, Tensor]]:
        """K + v, which orders the experts of a token as its row of Π does, and how well that is balanced."""
        options, group = self.options, self.options.group(context)
        scaled_TE = logits_TE / options.entropy
        log_TE = scaled_TE + sinkhorn(scaled_TE, options.iterations, context.mask_T, group, options.tolerance)
        return log_TE, {"column_error": column_error(log_TE.softmax(-1), context.mask_T, group)}
