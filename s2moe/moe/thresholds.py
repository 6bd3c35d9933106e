"""Running thresholds: the causal form, for inference, of routers that choose the best of many pairs.

A contest among tokens (moe/contest.py) looks at later tokens. Compared with a fixed threshold each token is
decided on its own (for Expert Choice: Sun et al. 2026, "Expert Threshold Routing"):

    select (t, e)  iff  score_te >= threshold        threshold = EMA over training steps of the last winner's score

The average is over all tokens of an optimizer step (every group's cutoff, weighted by its real tokens), and
corrected for its start, as Adam's moments are: with m_i the mean of step i and decay d, after n steps

    threshold = sum_n / weight_n,    sum_n = d sum_{n-1} + (1 - d) m_n,    weight_n = 1 - d^n

Thresholds are kept for several budgets, so that a trained model can be evaluated with fewer or more experts per
token. All experts need none. They meet a budget on average, not in every sequence.

Legend: T tokens, E experts, G groups, X contests of a group, B budgets, N = B X thresholds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2moe.moe.contest import Contest
from s2moe.precision import KeepsBuffers


class RunningThresholds(KeepsBuffers):
    """Thresholds for the trained budget and for 1, 2, 4, ... experts per token.

    Args:
        contests: X; 1 threshold for all experts, or one for each.
    """

    sum_N: Tensor
    weight: Tensor

    def __init__(self, num_experts: int, budget: float, contests: int, decay: float) -> None:
        super().__init__()
        self.num_experts, self.contests, self.decay = num_experts, contests, decay
        powers = {2.0**i for i in range(num_experts.bit_length())}
        self.budgets = sorted(b for b in powers | {float(budget)} if b < num_experts)
        self.register_buffer("sum_N", torch.zeros(len(self.budgets) * contests, dtype=torch.float32))
        self.register_buffer("weight", torch.zeros(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Forget everything."""
        for buffer in (self.sum_N, self.weight):
            if not buffer.is_meta:
                nn.init.zeros_(buffer)

    def feedback(self, contest: Contest) -> Tensor:
        """What may be summed over micro-batches and ranks: N cutoffs times tokens, and the tokens, [N + 1]."""
        cutoff_GBX, tokens_G = contest.cutoffs(self.budgets), contest.tokens_G.to(contest.score_GCX.dtype)
        return torch.cat(((cutoff_GBX * tokens_G[:, None, None]).sum(0).reshape(-1), tokens_G.sum()[None]))

    @torch.no_grad()
    def update(self, feedback: Tensor) -> None:
        """Learn from a step's summed feedback; nothing, if it is of no tokens."""
        feedback = feedback.to(self.sum_N.dtype)
        tokens = feedback[-1:]
        rate = (tokens > 0).to(feedback.dtype) * (1 - self.decay)
        self.sum_N.lerp_(feedback[:-1] / tokens.clamp(min=1), rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)

    def passing(self, score_TE: Tensor, budget: float, untrained_TE: Tensor) -> Tensor:
        """The pairs at or above the budget's threshold, bool [T, E].

        Args:
            untrained_TE: the answer before any step has been learnt from.

        Raises:
            ValueError: where no threshold is kept for ``budget``.
        """
        if budget == self.num_experts:
            return torch.ones_like(untrained_TE)
        if budget not in self.budgets:
            known = ", ".join(f"{b:g}" for b in [*self.budgets, self.num_experts])
            raise ValueError(
                f"no threshold was learnt for {budget:g} experts per token: choose one of {known}, or set the router's "
                "option inference=topk (causal) or inference=scope (not causal), which take any number"
            )
        threshold_X = self.sum_N.view(-1, self.contests)[self.budgets.index(budget)] / self.weight
        return torch.where(self.weight > 0, score_TE >= threshold_X, untrained_TE)
