"""Expert Choice: experts take their best tokens, all equally many.

Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing". For n tokens and E experts

    S = softmax over experts of X W^T           (score=sigmoid: each logit's sigmoid)
    expert e takes the C = n c / E tokens with the highest S_te,   y_t = Σ_{e that took t} S_te E_e(x_t)

c, the paper's capacity factor, is here the budget of experts per token (2 by default). The load is balanced by
construction, so there is no auxiliary loss; a token has 0 to E experts. C is rounded up.

The paper's variant with at most b experts per token (EC-CAP) solves a linear programme in which an expert that
loses a token takes another. ``max_experts_per_token`` is simpler and not the same: each token keeps its b best of
the experts that chose it, and an expert that loses a token goes without, so loads are at most C, no longer equal.
In return it needs no iteration, and holds token by token at inference too.

Causality: none in training (scope=token_batch: the other sequences matter as well). Inference is by threshold,
one for each expert, and causal: see competitive.py. Its loads are equal only on average.

Legend: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s2moe.moe.assignments import ragged
from s2moe.moe.contest import best_of_token
from s2moe.moe.routers.base import register
from s2moe.moe.routers.competitive import CompetitiveOptions, CompetitiveRouter
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.options import option


@dataclass(kw_only=True)
class ExpertChoiceOptions(CompetitiveOptions):
    """Options of ``router.name: expert_choice``."""

    scope: str = option(
        "token_batch",
        "from which tokens an expert takes its best in training: token_batch: this rank's micro-batch; sequence: each "
        "sequence",
        choices=("token_batch", "sequence"),
    )
    score: str = option(
        "softmax",
        "softmax: over experts (the paper); sigmoid: of each logit, which other experts' logits leave alone",
        choices=("softmax", "sigmoid"),
    )
    max_experts_per_token: int | None = option(
        None, "a token keeps its so many best of the experts that chose it; null: all (not the paper's EC-CAP)"
    )


@register("expert_choice")
class ExpertChoiceRouter(CompetitiveRouter):
    """Each expert's best tokens in training, not causal; tokens above its running threshold at inference, causal."""

    Options = ExpertChoiceOptions
    options: ExpertChoiceOptions
    per_expert = True

    def __init__(
        self, hidden_size: int, num_experts: int, experts_per_token: int, options: ExpertChoiceOptions
    ) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        most = options.max_experts_per_token
        if most is not None and not 1 <= most <= num_experts:
            raise ValueError(f"max_experts_per_token must lie in 1..{num_experts} or be null, got {most}")

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TE = self.scores(hidden_TD)
        prob_TE = logits_TE.softmax(-1)
        score_TE = logits_TE.sigmoid() if self.options.score == "sigmoid" else prob_TE
        chosen_TE, feedback, stats = self.choose(score_TE, context)
        return ragged(chosen_TE, score_TE, prob_TE, context, stats=stats, feedback=feedback)

    def limit(self, chosen_TE: Tensor, score_TE: Tensor) -> Tensor:
        most = self.options.max_experts_per_token
        return chosen_TE if most is None else best_of_token(score_TE, most, among_TE=chosen_TE)
