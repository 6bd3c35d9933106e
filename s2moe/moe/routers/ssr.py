"""Selective Sinkhorn Routing: now and then a training step routes by a balanced transport plan.

In each layer, with probability p a training step takes the plan Π of moe/transport.py for the cost C; all other
steps, and inference, take the softmax P of the logits L = h W_rᵀ:

    C = L  or  P,   Π = argmax ⟨Π, C⟩ − ξ ⟨Π, log Π⟩  with balanced marginals
    S = Π  in a Sinkhorn step,   S = P  otherwise (of L + σ ε, ε ~ N(0, 1), if there is noise)
    A_t = the k experts of highest S_ti
    g_ti = S_ti / Σ_{j ∈ A_t} S_tj      k > 1
    g_ti = S_ti                         k = 1, where the quotient would be 1 and the router learn nothing
    y_t = Σ_{i ∈ A_t} g_ti · expert_i(h_t)

There is no auxiliary loss. Unlike S-BASE the weights come from the plan itself.

What is left open, and how it is read here:

* Gradient through Π. The solver runs without gradient, and one row step is differentiable: Π_t =
  softmax(C_t/ξ + v), with v constant. The value is exactly Π's. ``detach`` gives no gradient at all.
* Weights of the ordinary steps. They follow the same rule as the plan's (``renormalise``), so that both kinds of
  steps, and inference, have outputs of one scale.
* ξ. With C = L the default 1 makes Π a softmax of the logits plus a bias of each expert, as sharp as P. With
  C = P, whose values span at most 1, it is 0.05.
* The draw is keyed by (seed, step, layer): all ranks, all micro-batches and both passes of S2MoE agree.

Causality: in a Sinkhorn step a token's experts depend on the whole micro-batch (of all ranks with
marginals=global), later tokens included. Ordinary steps and inference never do: each token is on its own.

Legend: T tokens, D model, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2moe.moe.assignments import per_token
from s2moe.moe.routers.base import LinearScores, Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.transport import TransportOptions, column_error, sinkhorn
from s2moe.options import option

ENTROPY = {"logits": 1.0, "softmax": 0.05}


@dataclass(kw_only=True)
class SSROptions(TransportOptions):
    """Options of ``router.name: ssr``."""

    probability: float = option(
        0.01, "share of training steps that a layer routes by the plan (0.001 to 0.01)", least=0, most=1
    )
    cost: str = option("logits", "C: the logits, or their softmax", choices=tuple(ENTROPY), needs="probability")
    entropy: float | None = option(
        None,
        "xi, the weight of the plan's entropy: smaller is sharper. null: 1 with cost=logits, 0.05 with softmax",
        above=0,
        needs="probability",
    )
    noise: float = option(0.0, "standard deviation of Gaussian noise on the logits in ordinary training steps", least=0)
    detach: bool = option(False, "no gradient to the router in Sinkhorn steps", needs="probability")
    renormalise: bool | None = option(
        None,
        "divide a token's weights by their sum, in every step and in evaluation. null: where experts_per_token > 1 "
        "(refused at 1, where every weight would be 1 and the router get no gradient)",
    )


@register("ssr")
class SSRRouter(Router):
    """Softmax top-k, and in few training steps top-k of a balanced plan. Causal in evaluation: see the module."""

    Options = SSROptions
    options: SSROptions

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: SSROptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        if experts_per_token == 1 and options.renormalise:
            raise ValueError(
                "renormalise with experts_per_token=1 makes every weight 1, so the router would get no gradient "
                "from the task: set renormalise=null (or false)"
            )
        self.entropy = ENTROPY[options.cost] if options.entropy is None else options.entropy
        self.renormalise = experts_per_token > 1 if options.renormalise is None else options.renormalise
        self.scores = LinearScores(hidden_size, num_experts)

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices = self.choices(context)
        logits_TE = self.scores(hidden_TD)
        by_plan = self.training and self._is_sinkhorn_step(context)
        if by_plan:
            score_TE = self._log_plan(logits_TE, context)
        else:
            score_TE = self._noisy(logits_TE, context)

        expert_TK = score_TE.detach().topk(choices, dim=-1).indices
        if self.renormalise:
            weight_TK = score_TE.gather(-1, expert_TK).softmax(-1)
        else:
            weight_TK = score_TE.softmax(-1).gather(-1, expert_TK)
        if by_plan and self.options.detach:
            weight_TK = weight_TK.detach() + 0 * weight_TK  # a gradient of zero, not none: the optimizer wants one

        stats = {}
        if self.training:
            stats["sinkhorn_step"] = logits_TE.new_full((), by_plan, dtype=torch.float32)
            stats["column_error"] = column_error(
                score_TE.detach().softmax(-1), context.mask_T, self.options.group(context)
            )
        return per_token(expert_TK, weight_TK, logits_TE.softmax(-1), context, stats=stats)

    def _is_sinkhorn_step(self, context: RoutingContext) -> bool:
        drawn = torch.rand((), generator=context.shared_generator("selective sinkhorn"))  # on the CPU: no waiting
        return drawn.item() < self.options.probability

    def _log_plan(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """K + v, whose softmax over a row is that row of Π."""
        cost_TE = logits_TE if self.options.cost == "logits" else logits_TE.softmax(-1)
        scaled_TE = cost_TE / self.entropy
        options = self.options
        v_E = sinkhorn(scaled_TE, options.iterations, context.mask_T, options.group(context), options.tolerance)
        return scaled_TE + v_E

    def _noisy(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        if not (self.training and self.options.noise):
            return logits_TE
        generator = context.generator(logits_TE.device, "router noise")
        noise_TE = torch.randn(logits_TE.shape, generator=generator, device=logits_TE.device, dtype=logits_TE.dtype)
        return logits_TE + self.options.noise * noise_TE
