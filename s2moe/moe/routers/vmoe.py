"""V-MoE routing, with Batch Prioritized Routing.

Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts" (arXiv 2106.05974). For a token x

    g(x) = TOP_k(softmax(W x + ε)),   ε ~ N(0, (noise / E)²) for each logit, in training only
    MoE(x) = Σ_{i among the k, within capacity} g_i e_i(x)

The softmax comes before the choice, and what is left of it is not renormalised: weights sum to less than 1. An expert
takes at most round(C k T / E) assignments of a routing group's T tokens; where that is none, training refuses and
inference takes one. Vanilla routing places all first choices in
order of position, then all second ones; Batch Prioritized Routing visits tokens by their highest weight (or the sum of
their k), so that those go first that the router is sure of. What finds no place contributes nothing, and a token
without any expert passes through the residual alone.

    importance_i = Σ_t softmax(W x_t)_i                                          without noise
    load_i       = Σ_t 1 − Φ((τ_t − (W x_t)_i) E / noise),   τ_t = the k-th highest noisy logit of token t
    L            = 0.005 CV²(importance) + 0.005 CV²(load)                        population variance, in each group

The gradient of the load flows through the clean logits and through the threshold. Both losses are means over groups of
this rank's micro-batch.

What the paper leaves open, or its released code does otherwise, is an option: groups of 8 images there
(``group_size``), the whole batch in the paper, this rank's micro-batch here; capacity rounded up to a multiple of 4
there; scores by the highest weight there, the paper has both.

Capacity at inference, C from 0.1 to 4, is the paper's way to spend less on an image, and needs no retraining:
``inference_capacity``, or ``model.set_inference`` of a vision model for one checkpoint at many. It makes a token's
output depend on the others of its batch, as priorities do in training, so a causal model refuses both. Vanilla
routing with capacity in training alone is open to it, as GShard's is.

Legend: T tokens, D model, G routing groups, E experts, K choices per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s2moe.moe.assignments import keep, load_of, per_token
from s2moe.moe.balancing import weigh
from s2moe.moe.capacity import ROUNDINGS, group_capacity, keep_by_priority, require_places
from s2moe.moe.routers.base import LinearScores, Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.objectives.balance import cv_squared, masked_mean
from s2moe.options import Checked, option

PRIORITIES = ("none", "max", "sum")


@dataclass(kw_only=True)
class VMoEOptions(Checked):
    """Options of ``router.name: vmoe``."""

    noise: float = option(
        1.0, "standard deviation of the logits' noise in training, times the number of experts", least=0
    )
    capacity_factor: float | None = option(
        1.05, "C in training: an expert takes C k T / E assignments of a group's T tokens; null: dropless", above=0
    )
    inference_capacity: float | None = option(
        None, "C at inference; null: dropless, hence causal. Refused by causal models", above=0
    )
    rounding: str = option(
        "round",
        "of the capacity: to the nearest; multiple_of_4: up (the released code)",
        choices=ROUNDINGS,
        needs="capacity_factor or inference_capacity",
    )
    priority: str = option(
        "none",
        "who gets an expert's places, in training and at inference. none: vanilla, by position; max: Batch Prioritized "
        "Routing by a token's highest weight; sum: by the sum of its k weights. Refused by causal models",
        choices=PRIORITIES,
        needs="capacity_factor or inference_capacity",
    )
    group_size: int | None = option(
        None,
        "images (sequences) of a routing group (the released code: 8); null: the whole micro-batch of a rank",
        least=1,
        needs="capacity_factor or inference_capacity or importance_loss or load_loss",
    )
    importance_loss: float = option(0.005, "coefficient of CV^2 of the summed probabilities without noise", least=0)
    load_loss: float = option(0.005, "coefficient of CV^2 of the smooth load; needs noise", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_loss and not self.noise:
            raise ValueError("load_loss is defined by the logits' noise: set noise above 0, or load_loss=0")


def check_capacity(name: str, factor: float | None) -> None:
    """Raise ValueError unless it is a positive number, or None."""
    if factor is not None and not factor > 0:
        raise ValueError(f"{name} must be positive, got {factor}; without a limit: null in the settings")


@register("vmoe")
class VMoERouter(Router):
    """Softmax before top-k, capacity, priorities."""

    Options = VMoEOptions
    options: VMoEOptions

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: VMoEOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        self.scores = LinearScores(hidden_size, num_experts)
        self.inference_capacity = options.inference_capacity  # these two: see ``set_inference``
        self.inference_priority = options.priority

    def refuses_causal(self) -> str:
        options = self.options
        if options.priority != "none":
            return f"priority={options.priority} places tokens by the scores of later ones: set priority=none"
        if options.inference_capacity is not None:
            return "inference_capacity drops a token's experts for the sake of others: set inference_capacity=null"
        return ""

    def require_places(self, tokens: int, sequences: int, choices: int | None = None) -> None:
        """Raise ValueError if, of a micro-batch of so many tokens in training, an expert would have no place at all."""
        options = self.options
        if options.capacity_factor is not None and options.rounding == "round":
            size = min(self._group_tokens(tokens, sequences), tokens)
            require_places(options.capacity_factor, choices or self.experts_per_token, self.num_experts, size)

    def set_inference(self, capacity_factor: float | None, priority: str | None) -> None:
        """Evaluate with this C (math.inf: dropless) and priority from now on; None: as the options have it."""
        check_capacity("capacity_factor", capacity_factor)
        priority = self.options.priority if priority is None else priority
        if priority not in PRIORITIES:
            raise ValueError(f"priority: must be one of {', '.join(PRIORITIES)}, got {priority!r}")
        factor = self.options.inference_capacity if capacity_factor is None else capacity_factor
        self.inference_capacity = None if factor == math.inf else factor
        self.inference_priority = priority

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        options, choices, mask_T = self.options, self.choices(context), context.mask_T
        clean_TE = self.scores(hidden_TD)
        noisy_TE = clean_TE
        if self.training and options.noise:
            generator = context.generator(clean_TE.device, "router noise")
            noise_TE = torch.randn(clean_TE.shape, generator=generator, device=clean_TE.device, dtype=clean_TE.dtype)
            noisy_TE = clean_TE + options.noise / self.num_experts * noise_TE
        prob_TE = noisy_TE.softmax(-1)
        top_TK, expert_TK = noisy_TE.topk(choices, dim=-1)
        weight_TK = prob_TE.gather(-1, expert_TK)

        size = self._group_tokens(len(hidden_TD), context.sequences)
        real_T1 = clean_TE.new_ones(len(hidden_TD), 1) if mask_T is None else mask_T[:, None].to(clean_TE.dtype)
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        if self.training:
            losses, stats = weigh(options, self._losses(clean_TE, top_TK[:, -1:], real_T1, size))
        load_E = load_of(expert_TK, self.num_experts, mask_T)
        routing = per_token(expert_TK, weight_TK, prob_TE, context, losses, stats, load_E)
        factor = options.capacity_factor if self.training else self.inference_capacity
        if factor is None:
            return routing

        if self.training:
            self.require_places(len(hidden_TD), context.sequences, choices)
        tokens_G = group_sums(real_T1.double(), size)[:, 0]
        capacity_G = group_capacity(factor, choices, self.num_experts, tokens_G, options.rounding)
        group_T = torch.arange(len(hidden_TD), device=hidden_TD.device) // size
        priority = options.priority if self.training else self.inference_priority
        score_T = {"none": None, "max": weight_TK[:, 0], "sum": weight_TK.sum(-1)}[priority]
        kept_TK = keep_by_priority(expert_TK, self.num_experts, capacity_G, group_T, score_T, mask_T)
        routing.stats["capacity"] = capacity_G.mean().float()
        routing.stats["tokens_without_expert"] = masked_mean((~kept_TK.any(-1)).to(clean_TE.dtype), mask_T)
        return keep(routing, kept_TK.reshape(-1))

    def _group_tokens(self, tokens: int, sequences: int) -> int:
        """The tokens of a routing group, padding included; the last group may have fewer."""
        size = self.options.group_size
        return tokens if size is None or size >= sequences else tokens // sequences * size

    def _losses(self, clean_TE: Tensor, threshold_T1: Tensor, real_T1: Tensor, size: int) -> dict[str, Tensor]:
        """The raw losses whose coefficient is not zero, by the name of that coefficient: means over groups."""
        losses = {}
        if self.options.importance_loss:
            losses["importance_loss"] = cv_squared(group_sums(clean_TE.softmax(-1) * real_T1, size)).mean()
        if self.options.load_loss:
            std = self.options.noise / self.num_experts
            chance_TE = torch.special.ndtr((clean_TE - threshold_T1) / std)
            losses["load_loss"] = cv_squared(group_sums(chance_TE * real_T1, size)).mean()
        return losses


def group_sums(value_TX: Tensor, size: int) -> Tensor:
    """Sums over groups of ``size`` rows, one after another, of which the last may be smaller, [G, X]."""
    groups = -(-len(value_TX) // size)
    padded_TX = F.pad(value_TX, (0, 0, 0, groups * size - len(value_TX)))
    return padded_TX.view(groups, size, -1).sum(1)
