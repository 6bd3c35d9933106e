"""What USMoE and Expert Choice share: pairs compete in training, and pass thresholds at inference.

In training the best pairs of a scope win (moe/contest.py), which looks at later tokens and cannot be had
otherwise: the budget is shared. At inference

    threshold   pairs at or above a running threshold learnt in training (moe/thresholds.py): causal, the default.
                Before the first step there is none: each token takes its own best ceil(budget) experts.
    topk        each token's own best ceil(budget) experts: causal, another selection than in training
    scope       the contest of training: NOT causal (scope=time_step: causal over time, but a sequence's output
                depends on the others of its batch). For comparison with figures published that way

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from s2moe.moe.contest import Contest, best_of_token
from s2moe.moe.routers.base import LinearScores, Router
from s2moe.moe.routing import RoutingContext
from s2moe.moe.thresholds import RunningThresholds
from s2moe.objectives.balance import masked_mean
from s2moe.options import Checked, option


@dataclass(kw_only=True)
class CompetitiveOptions(Checked):
    """Options of routers whose pairs compete; a router's own options subclass them."""

    scope: str  # each router has its own choices
    budget: float | None = option(
        None, "experts per token on average, may be a fraction, 1.5 say; null: experts_per_token"
    )
    inference: str = option(
        "threshold",
        "how pairs are chosen in evaluation. threshold: score at or above a running threshold learnt in training "
        "(causal); topk: each token's best (causal); scope: as in training (not causal, for comparison with figures "
        "published that way)",
        choices=("threshold", "topk", "scope"),
    )
    threshold_decay: float = option(
        0.95,
        "decay of the running threshold at each optimizer step: 0.95 remembers about 20 steps",
        least=0,
        below=1,
        needs="inference=threshold",
    )


class CompetitiveRouter(Router):
    """Linear logits, whose scores compete for a budget of pairs."""

    per_expert: ClassVar[bool]  # whether each expert's pairs compete among themselves
    options: CompetitiveOptions

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: CompetitiveOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        self.trained_budget = float(experts_per_token if options.budget is None else options.budget)
        if not 0 < self.trained_budget <= num_experts:
            raise ValueError(f"budget must be positive and at most num_experts ({num_experts}), got {options.budget}")
        self.scores = LinearScores(hidden_size, num_experts)
        contests = num_experts if self.per_expert else 1
        self.thresholds = RunningThresholds(num_experts, self.trained_budget, contests, options.threshold_decay)

    def mean_choices(self, training: bool) -> float:
        return self.trained_budget

    def reset_parameters(self, std: float) -> None:
        self.thresholds.reset_parameters()

    def budget(self, context: RoutingContext) -> float:
        """Experts per token on average: as trained, or k' of the evaluation."""
        return self.trained_budget if context.experts_per_token is None else float(self.choices(context))

    def choose(self, score_TE: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The chosen pairs (bool [T, E], padding included where it is nobody's rival), feedback and figures."""
        score_TE, budget = score_TE.detach(), self.budget(context)
        if not self.training and self.options.inference != "scope":
            return self._causal(score_TE, budget, self.options.inference), None, {}
        contest = Contest(score_TE, self.options.scope, context, self.per_expert)
        chosen_TE = self.limit(contest.winners(budget), score_TE)
        if not self.training:
            return chosen_TE, None, {}
        # The thresholds are for clean tokens, of which alone there are some at inference.
        feedback = self.thresholds.feedback(contest) if context.copy == 0 else None
        would_T = self._causal(score_TE, self.trained_budget, "threshold").sum(1).to(score_TE.dtype)
        return chosen_TE, feedback, {"inference_experts_per_token": masked_mean(would_T, context.mask_T)}

    def _causal(self, score_TE: Tensor, budget: float, inference: str) -> Tensor:
        chosen_TE = best_of_token(score_TE, math.ceil(budget))
        if inference == "threshold":
            chosen_TE = self.thresholds.passing(score_TE, budget, untrained_TE=chosen_TE)
        return self.limit(chosen_TE, score_TE)

    def limit(self, chosen_TE: Tensor, score_TE: Tensor) -> Tensor:
        """What is left of the chosen pairs; all, unless a router has a rule of its own."""
        return chosen_TE

    def after_step(self, feedback: Tensor) -> None:
        """The step's thresholds, averaged over its tokens on all ranks."""
        self.thresholds.update(feedback)
