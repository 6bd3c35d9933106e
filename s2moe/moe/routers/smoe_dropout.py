"""SMoE-Dropout: a random router that never learns, and more and more experts per token.

Chen et al. 2023, "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers". With W ∈ R^{E×D}
drawn once and frozen, in step t of T

    s   = W h                                                   logits of a token
    A   = the k_t experts of highest s
    w_a = exp(s_a) / Σ_{j ∈ A} exp(s_j)    for a in A           softmax over the chosen logits
    k_t = round(k_0 + (k_T − k_0) · t / T)                      linear; other schedules below

k_T is ``experts_per_token`` (the paper: all E), k_0 half of it. No balance loss: hidden states decide the load. A
token's mean number of experts is 3E/4, so compare methods by FLOPs, not by steps.

The other schedules are those of the published code, with its rounding (halves to even), the first two as weights p(t)
in k_t = round((k_0 − k_T) · p(t)) + k_T:

    cosine        p = cos(π t / 2T)                  a quarter wave: slow at first
    exponential   p = 0.99^⌊t / ⌊T / 300⌋⌋           300 stairs or more; ends 5 % of the way short, or less
    steps         k_t = the ⌊m t / T⌋-th of the m powers of two 1, 2, 4, .., E, held within k_0..k_T. With 16 experts:
                  equally long stays at 1, 2, 4, 8, 16, so that from 8 to 16 the first four of five are at 8
    constant      k_t = k_T always: a frozen random router, which some later work calls SMoE-Dropout

Their exponential form divides by zero below 300 steps; here p = 0.99^⌊300 t / T⌋ there. Where E is no power of two, E
itself is the last stay. From step T on it is k_T.

k_0 above k_T makes them decreasing; ``steps`` then walks the powers backwards.

k = 1 is allowed although its weight is always 1: there is no router here that would have to learn from it.

W is a buffer: no optimizer moves or decays it, it keeps float32 in a model of lower precision, and checkpoints and
exports hold it. torch's seed decides it, so it is the same on all ranks at every expert-parallel degree. Its spread
is the model's ``initializer_range`` (the published code: 0.02, without a bias, as here).

Inference: k_T experts, or any number k' ("self-slimmable"). A token's choice is its own: causal, in training too.

Legend: T tokens, D model, E experts, K choices per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2moe.moe.assignments import per_token
from s2moe.moe.routers.base import Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.options import Checked, option
from s2moe.precision import linear

SCHEDULES = ("linear", "cosine", "exponential", "steps", "constant")


@dataclass(kw_only=True)
class SMoEDropoutOptions(Checked):
    """Options of ``router.name: smoe_dropout``."""

    schedule: str = option(
        "linear",
        "how the number of experts per token gets from first_experts to experts_per_token. linear; cosine: a quarter "
        "wave, slow at first; exponential: fast at first; steps: equally long stays at 1, 2, 4, .., all experts, held "
        "between the two numbers; constant: experts_per_token always",
        choices=SCHEDULES,
    )
    first_experts: int | None = option(
        None,
        "experts per token at the first step (the paper's k_min); null: half of experts_per_token. "
        "Above experts_per_token the schedule decreases",
        needs="schedule!=constant",
    )
    schedule_steps: int | None = option(
        None,
        "training steps after which experts_per_token is reached; null: those of the run",
        least=1,
        needs="schedule!=constant",
    )


@register("smoe_dropout")
class SMoEDropoutRouter(Router):
    """Top-k of a frozen random projection, with k on a schedule in training."""

    Options = SMoEDropoutOptions  # weights that are constant at k = 1 are no mistake: the router is not to learn
    tokenwise = True
    options: SMoEDropoutOptions
    weight_ED: Tensor

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: SMoEDropoutOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        first = options.first_experts
        if options.schedule == "constant" and first not in (None, experts_per_token):
            raise ValueError(
                f"first_experts={first} has no meaning with schedule=constant, which always takes experts_per_token="
                f"{experts_per_token}: leave it null, or choose one of {', '.join(SCHEDULES[:-1])}"
            )
        if first is not None and not 1 <= first <= num_experts:
            raise ValueError(f"first_experts must lie in 1..{num_experts}, or be null, got {first}")
        if options.schedule_steps is not None and options.schedule_steps < 1:
            raise ValueError(f"schedule_steps must be at least 1, or null, got {options.schedule_steps}")
        self.first_experts = first or max(1, experts_per_token // 2)
        self.register_buffer("weight_ED", torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight_ED, std=std)  # left alone by transformers where it was loaded

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices = self.choices(context)
        logits_TE = linear(hidden_TD, self.weight_ED)
        top_TK, expert_TK = logits_TE.topk(choices, dim=-1)
        stats = {"experts_per_token": torch.full((), float(choices), device=hidden_TD.device)}
        return per_token(expert_TK, top_TK.softmax(-1), logits_TE.softmax(-1), context, stats=stats)

    def choices(self, context: RoutingContext) -> int:
        """k_t in training; in evaluation, and where a number is asked for, that of every router."""
        if not self.training or context.experts_per_token is not None or self.options.schedule == "constant":
            return super().choices(context)
        steps = context.total_steps(self.options.schedule_steps, "the schedule of SMoE-Dropout")
        return self._scheduled(context.step, steps)

    def _scheduled(self, step: int, steps: int) -> int:
        first, last = self.first_experts, self.experts_per_token
        return scheduled_choices(self.options.schedule, first, last, self.num_experts, step, steps)

    def mean_choices(self, training: bool) -> float:
        if not training or self.options.schedule == "constant":
            return float(self.experts_per_token)
        points = 1200  # a multiple of the exponential's 300 stairs
        return sum(self._scheduled(step, points) for step in range(points)) / points

    def expert_embeddings(self) -> Tensor:
        return self.weight_ED


def scheduled_choices(schedule: str, first: int, last: int, num_experts: int, step: int, steps: int) -> int:
    """k_t of the module's docstring; ``last`` from step ``steps`` on.

    Python's round takes halves to the even number, as the published code does.
    """
    if step >= steps:
        return last
    if schedule == "linear":
        return round((last - first) * step / steps) + first
    if schedule == "steps":
        ladder = [2**power for power in range((num_experts - 1).bit_length())] + [num_experts]
        least, most = sorted((first, last))
        stay = ladder[:: 1 if first <= last else -1][len(ladder) * step // steps]
        return min(max(stay, least), most)
    if schedule == "cosine":
        remaining = math.cos(math.pi * step / (2 * steps))
    else:
        remaining = 0.99 ** (step // (steps // 300) if steps >= 300 else 300 * step // steps)
    return round((first - last) * remaining) + last
