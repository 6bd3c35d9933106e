"""X-MoE: routing on a low-dimensional hypersphere.

Chi et al. 2022, "On the Representation Collapse of Sparse Mixture of Experts". A linear router pulls hidden
states towards the span of the E expert embeddings. X-MoE scores in a space of its own, by angle alone:

    s_ti  = cos(W h_t, e_i),   W ∈ R^{C×D},  e_i ∈ R^C              C = E/2
    A_t   = the k experts of highest s_ti                            (paper: k = 1)
    g_ti  = softmax(s_t / τ)_i   or   σ(s_ti / τ)                    τ = exp(ρ) learned, at least 1e-4
    y_t   = Σ_{i ∈ A_t} g_ti · expert_i(h_t)
    L_bal = E Σ_i f_i · mean_t softmax(s_t / τ0)_i                   τ0 fixed, f_i = share of assignments

With ``renormalise`` or ``combine=straight_through`` a token's g sum to 1 (moe/shares.py), which the paper leaves out.

The temperature τ has no part in the choice of experts, and the balance loss none in τ. The paper leaves
open whether f_i is a count or a share: only a share makes the loss independent of the batch's size. Nor does it
say where τ starts: here at τ0's default, 0.3 (softmax) or 0.07 (sigmoid).

For fine-tuning the paper freezes routers and experts and keeps the balance loss: see moe/freezing.py.

Inference: the same without losses; any number of experts. Causal in training too: a token's choice is its own.

Legend: T tokens, D model, E experts, C dimension of the hypersphere, K choices per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2moe.moe.assignments import load_of, per_token
from s2moe.moe.balancing import BalanceOptions, balance_terms, weigh
from s2moe.moe.routers.base import Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.shares import ShareOptions, require_gradient, weights_of
from s2moe.options import option
from s2moe.precision import FullPrecisionLinear, full_precision, linear

TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}
LEAST_TEMPERATURE = 1e-4
NORM_EPS = 1e-6  # a shorter vector is divided by this instead of its norm


@dataclass(kw_only=True)
class XMoEOptions(BalanceOptions, ShareOptions):
    """Options of ``router.name: xmoe``. z_loss is of the gate's logits s / τ: it holds the temperature up."""

    gate: str = option(
        "softmax",
        "a chosen expert's weight. softmax: of s / temperature over all experts; sigmoid: of its own s / temperature",
        choices=tuple(TEMPERATURE),
    )
    dimension: int | None = option(
        None, "dimension of the hypersphere; null: half the number of experts", least=1, most=2**20
    )
    temperature: float | None = option(
        None,
        "where the learned temperature of the gate starts; null: 0.3 with gate=softmax, 0.07 with sigmoid",
        least=LEAST_TEMPERATURE,
    )
    balance_temperature: float | None = option(
        None,
        "fixed temperature of the balance loss; null: 0.3 with gate=softmax, 0.07 with sigmoid",
        least=LEAST_TEMPERATURE,
        needs="balance_loss",
    )


@register("xmoe")
class XMoERouter(Router):
    """Each token takes the k experts whose embeddings lie at the smallest angle to its projection."""

    Options = XMoEOptions
    tokenwise = True
    options: XMoEOptions

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: XMoEOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        require_gradient(options, experts_per_token)
        dimension = options.dimension or max(1, num_experts // 2)
        self.projection = FullPrecisionLinear(hidden_size, dimension, bias=False)
        self.embedding_EC = nn.Parameter(torch.empty(num_experts, dimension))
        self.log_temperature = nn.Parameter(torch.empty(1))  # ρ; a vector, so without weight decay
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.embedding_EC, std=std)
        nn.init.constant_(self.log_temperature, math.log(self.options.temperature or TEMPERATURE[self.options.gate]))

    def expert_embeddings(self) -> Tensor:
        return self.embedding_EC

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        score_TE = self.scores(hidden_TD)
        temperature = full_precision(self.log_temperature).exp().clamp(min=LEAST_TEMPERATURE)
        logits_TE = score_TE / temperature
        prob_TE = logits_TE.softmax(-1)
        softmax = self.options.gate == "softmax"
        gate_TE, log_gate_TE = (prob_TE, logits_TE) if softmax else (logits_TE.sigmoid(), F.logsigmoid(logits_TE))
        expert_TK = score_TE.detach().topk(self.choices(context), dim=-1).indices
        weight_TK = weights_of(self.options, gate_TE.gather(-1, expert_TK), log_gate_TE.gather(-1, expert_TK))

        load_E = load_of(expert_TK, self.num_experts, context.mask_T)
        losses: dict[str, Tensor] = {}
        stats = {"temperature": temperature.detach()[0]}
        if self.training:
            fixed = self.options.balance_temperature or TEMPERATURE[self.options.gate]
            raw = balance_terms(self.options, logits_TE, (score_TE / fixed).softmax(-1), load_E, context)
            losses, figures = weigh(self.options, raw)
            stats |= figures
        return per_token(expert_TK, weight_TK, prob_TE, context, losses, stats, load_E)

    def scores(self, hidden_TD: Tensor) -> Tensor:
        """Cosine of each token's projection with each expert's embedding, [T, E], in full precision."""
        point_TC = F.normalize(self.projection(hidden_TD), dim=-1, eps=NORM_EPS)
        expert_EC = F.normalize(full_precision(self.embedding_EC), dim=-1, eps=NORM_EPS)
        return linear(point_TC, expert_EC)
