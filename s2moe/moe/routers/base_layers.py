"""BASE layers: every expert gets an equal share of the tokens, by a balanced assignment in training.

Lewis et al. 2021, "BASE Layers: Simplifying Training of Large, Sparse Models". One expert for each token:

    s_ti = h_t · e_i
    training:    a = argmax Σ_t s[t, a_t]  where every expert gets T/E tokens (⌊T/E⌋ or ⌈T/E⌉), without gradient
    evaluation:  a_t = argmax_i s_ti
    y_t = σ(s[t, a_t]) · expert_{a_t}(h_t)

The router learns through the gate σ alone. No balance loss is needed, so none is offered. Solver, optimality bound
and certificate: moe/auction.py.

The paper writes the output as σ Exp(h) + (1 − σ) h, where Exp contains a residual connection of its own, Exp(h) =
h + expert(h). That is h + σ expert(h): in a block that adds the layer's output to the residual stream, a weight σ.

Differences from the published code. There, ranks first exchange their tokens at random, and each then solves for the
tokens it has received; here each rank solves for its own micro-batch, which saves an exchange. Every rank's load is
equal, so the load of all is; but a micro-batch whose texts are of one kind is spread over all experts too. And an
auction on the device with a stated bound takes the place of one on the CPU, which waits for the device.

Causality: in training a token's expert depends on the whole micro-batch, later tokens included. Evaluation is each
token's own argmax, hence causal; an evaluation with k' > 1 takes the k' highest, each with its own gate.

Legend: T tokens, D model, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s2moe.moe.assignments import per_token
from s2moe.moe.auction import balanced_assignment
from s2moe.moe.routers.base import LinearScores, Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.options import Checked, option


@dataclass(kw_only=True)
class BaseOptions(Checked):
    """Options of ``router.name: base``."""

    epsilon: float = option(
        0.01,
        "least step of a bid, as a part of the widest range of a token's scores. The mean score of a token is at most "
        "about this much below the optimum's (measured: a hundredth of it); smaller takes more rounds",
        least=1e-6,
        most=1,
    )
    max_rounds: int = option(512, "rounds of bidding, after which tokens left over go where there is room", least=1)


@register("base")
class BaseLayersRouter(Router):
    """A balanced assignment in training, the best expert in evaluation, which is causal: see the module."""

    Options = BaseOptions
    options: BaseOptions

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: BaseOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        if experts_per_token != 1:
            raise ValueError(
                f"BASE assigns each token to one expert: set experts_per_token=1 (got {experts_per_token}), or use "
                "method=sbase, which balances any number"
            )
        self.scores = LinearScores(hidden_size, num_experts)

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices = self.choices(context)
        score_TE = self.scores(hidden_TD)
        stats = {}
        if self.training:
            if choices != 1:
                raise ValueError("BASE trains one expert a token: experts_per_token=k' is for evaluation")
            found = balanced_assignment(
                score_TE.detach(), context.mask_T, self.options.epsilon, self.options.max_rounds
            )
            expert_TK = found.expert_T[:, None]
            stats = {
                "assignment_gap": found.gap,
                "assignment_completed": found.completed,
                "auction_rounds": found.gap.new_full((), found.rounds),
            }
        else:
            expert_TK = score_TE.topk(choices, dim=-1).indices
        weight_TK = score_TE.sigmoid().gather(-1, expert_TK)
        return per_token(expert_TK, weight_TK, score_TE.softmax(-1), context, stats=stats)
