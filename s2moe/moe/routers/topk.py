"""Linear top-k routing, with every published rule of combination, noise, balance and capacity.

Legend: T tokens, D model, E experts, K choices per token, N assignments.

Sources:
    Shazeer et al. 2017, "Outrageously Large Neural Networks": noisy top-k, importance and load losses.
    Lepikhin et al. 2020, "GShard": top-2 with a random second choice, capacity, balance from first choices.
    Fedus et al. 2021, "Switch Transformers": k = 1, weight not renormalised, jitter.
    Zoph et al. 2022, "ST-MoE": z-loss.
    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing"; DeepSeek-V3 2024: selection bias, sequence-wise loss.

Each paper's combination of the options below has a name in moe/methods.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2moe.moe.assignments import keep, load_of, per_token
from s2moe.moe.balancing import BalanceOptions, global_load, weigh
from s2moe.moe.capacity import expert_capacity, keep_within_capacity
from s2moe.moe.routers.base import LinearScores, Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.rows import count
from s2moe.objectives.balance import (
    importance_loss,
    kl_balance_loss,
    masked_mean,
    mean_probability,
    noisy_load_loss,
    sequence_balance_loss,
    switch_balance_loss,
    z_loss,
)
from s2moe.options import option
from s2moe.precision import full_precision

COMBINE = ("softmax_then_topk", "topk_then_softmax", "sigmoid", "straight_through")


@dataclass(kw_only=True)
class TopKOptions(BalanceOptions):
    """Options of ``router.name: topk``."""

    combine: str = option(
        "softmax_then_topk",
        "how the logits become weights. softmax_then_topk: softmax over all experts, the chosen ones' values "
        "(Switch; the default, since it trains the router at any k). topk_then_softmax: softmax over the chosen "
        "ones (Mixtral; refused at k=1, where the weight is identically 1 and the router gets no gradient). "
        "sigmoid: each expert's own sigmoid (DeepSeek-V3). straight_through: the values of topk_then_softmax, "
        "the gradient of softmax_then_topk",
        choices=COMBINE,
    )
    renormalise: bool = option(False, "divide a token's weights by their sum (refused at k=1, as above)")
    scale: float = option(1.0, "factor of every weight (DeepSeek-V3: 2.5 with renormalised sigmoids)", above=0)
    noise: str = option(
        "none",
        "training only. shazeer: logits + softplus(x W_noise) * normal, learned; jitter: the router's input times "
        "uniform[1-jitter, 1+jitter] (Switch)",
        choices=("none", "shazeer", "jitter"),
    )
    jitter: float = option(0.01, "half-width of noise=jitter", least=0, below=1, needs="noise=jitter")
    zero_init: bool = option(
        False,
        "start the logits' matrix at zero (Shazeer, so that no expert is preferred at first; the noise's always does)",
    )
    second_choice: str = option(
        "always",
        "random (GShard; k=2, training only): the second expert is kept with probability min(1, 2 w2), where w2 is its "
        "share of the two weights; drawn before capacity is dealt out, so what is not kept takes nobody's place",
        choices=("always", "random"),
    )
    capacity_factor: float | None = option(
        None,
        "an expert takes at most ceil(capacity_factor * k * T / E) assignments of a micro-batch in training; "
        "null: dropless. Evaluation is always dropless, hence causal",
        above=0,
    )
    drop_policy: str = option(
        "position",
        "which assignments a full expert drops: position: first choices before second ones, then earlier tokens "
        "before later ones (GShard); probability: heavier weights before lighter ones",
        choices=("position", "probability"),
        needs="capacity_factor",
    )
    balance_form: str = option(
        "switch",
        "switch: E sum f_i P_i over all choices; gshard: f from first choices only; kl: KL(mean probability || "
        "uniform), which needs no f",
        choices=("switch", "gshard", "kl"),
        needs="balance_loss",
    )
    importance_loss: float = option(0.0, "coefficient of CV^2 of summed gate values (Shazeer: 0.1)", least=0)
    load_loss: float = option(
        0.0, "coefficient of CV^2 of the smooth load; needs noise=shazeer (Shazeer: 0.1)", least=0
    )
    sequence_loss: float = option(
        0.0,
        "coefficient of the balance loss within each sequence, by the scores without bias (DeepSeek-V3: 1e-4)",
        least=0,
    )
    bias_update_rate: float = option(
        0.0,
        "auxiliary-loss-free balancing: after every optimizer step each expert's selection bias moves by this much "
        "towards the mean load (DeepSeek-V3: 1e-3, with sigmoid). The bias never enters a weight",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_loss and self.noise != "shazeer":
            raise ValueError("load_loss is defined by Shazeer's noise: set noise=shazeer, or load_loss=0")


@register("topk")
class TopKRouter(Router):
    """Each token takes its k experts with the highest logits.

    Causal: a token's choice is its own. The exception is a capacity_factor in training, where a token may lose its
    place to others: by drop_policy=position to earlier tokens, and with its later choices to first choices of later
    tokens; by drop_policy=probability to any. Evaluation has no capacity.
    """

    Options = TopKOptions
    tokenwise = True
    options: TopKOptions
    bias_E: Tensor  # selection bias of auxiliary-loss-free balancing, where that is on

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: TopKOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        if experts_per_token == 1 and (options.combine == "topk_then_softmax" or options.renormalise):
            rule = "renormalise" if options.renormalise else "combine=topk_then_softmax"
            raise ValueError(
                f"{rule} with experts_per_token=1 makes every weight 1, so the router would get no gradient "
                "from the task: use combine=softmax_then_topk (or straight_through), renormalise=false"
            )
        if options.renormalise and options.combine == "straight_through":
            raise ValueError(
                "straight_through weights sum to 1 already, and renormalising would change their gradient: "
                "set renormalise=false, or combine=softmax_then_topk"
            )
        if options.load_loss and experts_per_token >= num_experts:
            raise ValueError(f"load_loss needs experts_per_token below the number of experts ({num_experts})")
        if options.second_choice == "random" and experts_per_token != 2:
            raise ValueError(
                f"second_choice=random is defined for two experts per token, not {experts_per_token}: set "
                "experts_per_token=2, or second_choice=always"
            )
        self.scores = LinearScores(hidden_size, num_experts, zero=options.zero_init)
        # At zero, all experts begin equally noisy.
        self.noise_scores = LinearScores(hidden_size, num_experts, zero=True) if options.noise == "shazeer" else None
        if options.bias_update_rate:
            self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def reset_parameters(self, std: float) -> None:
        if self.options.bias_update_rate and not self.bias_E.is_meta:
            nn.init.zeros_(self.bias_E)

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices = self.choices(context)
        clean_TE, logits_TE, std_TE = self._logits(hidden_TD, context)
        prob_TE = logits_TE.softmax(-1)
        value_TE = logits_TE.sigmoid() if self.options.combine == "sigmoid" else prob_TE
        expert_TK = self._select(logits_TE, value_TE, choices)
        weight_TK = self._weights(logits_TE, value_TE, expert_TK)

        asked_TK = self._asked(weight_TK, context) if self.training else None
        if asked_TK is None:
            load_E = load_of(expert_TK, self.num_experts, context.mask_T)
        else:
            load_E = count(expert_TK.reshape(-1), self.num_experts, asked_TK.reshape(-1))
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        if self.training:
            balance_TE = value_TE / value_TE.sum(-1, keepdim=True) if self.options.combine == "sigmoid" else prob_TE
            gate_TK = weight_TK if asked_TK is None else weight_TK * asked_TK
            raw = self._losses(clean_TE, logits_TE, std_TE, balance_TE, gate_TK, expert_TK, load_E, context)
            losses, stats = weigh(self.options, raw)
            if asked_TK is not None:
                stats["second_kept"] = masked_mean(asked_TK[:, 1].to(weight_TK.dtype), context.mask_T)
        feedback = load_E.float() if self.training and self.options.bias_update_rate else None
        routing = per_token(expert_TK, weight_TK, prob_TE, context, losses, stats, load_E, feedback)
        if not self.training or self.options.capacity_factor is None:
            return routing if asked_TK is None else keep(routing, asked_TK.reshape(-1))
        capacity = expert_capacity(
            self.options.capacity_factor, choices, self.num_experts, len(hidden_TD), context.mask_T
        ).to(hidden_TD.device, non_blocking=True)
        kept_TK = keep_within_capacity(
            expert_TK, weight_TK, self.num_experts, capacity, self.options.drop_policy, context.mask_T, asked_TK
        )
        return keep(routing, kept_TK.reshape(-1))

    @torch.no_grad()
    def _asked(self, weight_TK: Tensor, context: RoutingContext) -> Tensor | None:
        """Which of its two choices a real token makes use of, bool [T, 2]; None: all.

        GShard, algorithm 1: the first always, the second where 2 w2 / (w1 + w2) exceeds a uniform draw.
        """
        if self.options.second_choice == "always" or weight_TK.shape[1] != 2:
            return None
        generator = context.generator(weight_TK.device, "second choice")
        draw_T = torch.rand(len(weight_TK), generator=generator, device=weight_TK.device, dtype=weight_TK.dtype)
        second_T = 2 * weight_TK[:, 1] / weight_TK.sum(-1) > draw_T
        asked_TK = torch.stack((torch.ones_like(second_T), second_T), -1)
        return asked_TK if context.mask_T is None else asked_TK & context.mask_T[:, None]

    def _logits(self, hidden_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clean logits, the (noisy, in training) logits that decide, and the noise's standard deviation."""
        if not self.training or self.options.noise == "none":
            clean_TE = self.scores(hidden_TD)
            return clean_TE, clean_TE, None
        generator = context.generator(hidden_TD.device, "router noise")
        if self.options.noise == "jitter":
            hidden_TD = full_precision(hidden_TD)  # half precision has few numbers near 1
            factor_TD = torch.empty_like(hidden_TD).uniform_(
                1 - self.options.jitter, 1 + self.options.jitter, generator=generator
            )
            clean_TE = self.scores(hidden_TD * factor_TD)
            return clean_TE, clean_TE, None
        assert self.noise_scores is not None
        clean_TE = self.scores(hidden_TD)
        std_TE = F.softplus(self.noise_scores(hidden_TD)) + 0.01
        noise_TE = torch.randn(clean_TE.shape, generator=generator, device=clean_TE.device, dtype=clean_TE.dtype)
        return clean_TE, clean_TE + std_TE * noise_TE, std_TE

    def _select(self, logits_TE: Tensor, value_TE: Tensor, choices: int) -> Tensor:
        """The k best experts of each token, best first, [T, K]. The selection itself has no gradient."""
        with torch.no_grad():
            rank_TE = value_TE + self.bias_E if self.options.bias_update_rate else logits_TE
            return rank_TE.topk(choices, dim=-1).indices

    def _weights(self, logits_TE: Tensor, value_TE: Tensor, expert_TK: Tensor) -> Tensor:
        combine = self.options.combine
        if combine == "topk_then_softmax":
            weight_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
        else:
            weight_TK = value_TE.gather(-1, expert_TK)
        if combine == "straight_through":
            forward_TK = logits_TE.detach().gather(-1, expert_TK).softmax(-1)
            weight_TK = forward_TK + weight_TK - weight_TK.detach()
        if self.options.renormalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return weight_TK * self.options.scale if self.options.scale != 1 else weight_TK

    def _losses(
        self,
        clean_TE: Tensor,
        logits_TE: Tensor,
        std_TE: Tensor | None,
        prob_TE: Tensor,
        gate_TK: Tensor,
        expert_TK: Tensor,
        load_E: Tensor,
        context: RoutingContext,
    ) -> dict[str, Tensor]:
        """The raw losses whose coefficient is not zero, by the name of that coefficient."""
        options, mask_T = self.options, context.mask_T
        losses = {}
        if options.balance_loss:
            prob_E = mean_probability(prob_TE, mask_T)
            if options.balance_form == "kl":
                losses["balance_loss"] = kl_balance_loss(prob_E)
            else:
                if options.balance_form == "gshard":
                    load_E = load_of(expert_TK[:, :1], self.num_experts, mask_T)
                load_E = global_load(options, load_E, context)
                losses["balance_loss"] = switch_balance_loss(load_E.to(prob_E.dtype), prob_E)
        if options.z_loss:
            losses["z_loss"] = z_loss(clean_TE, mask_T)
        if options.importance_loss:
            gate_TE = torch.zeros_like(logits_TE).scatter(-1, expert_TK, gate_TK)
            losses["importance_loss"] = importance_loss(gate_TE, mask_T)
        if options.load_loss:
            assert std_TE is not None
            losses["load_loss"] = noisy_load_loss(clean_TE, logits_TE, std_TE, expert_TK.shape[1], mask_T)
        if options.sequence_loss:
            losses["sequence_loss"] = sequence_balance_loss(prob_TE, expert_TK.shape[1], context.sequences, mask_T)
        return losses

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Move the selection bias against the load by a fixed step; centred, as only differences matter."""
        self.bias_E += self.options.bias_update_rate * torch.sign(load_E.mean() - load_E)
        self.bias_E -= self.bias_E.mean()
