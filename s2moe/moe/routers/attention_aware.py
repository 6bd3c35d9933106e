"""Attention-Aware routing: tokens share the expert distributions of tokens that they attend to.

Nguyen et al. 2025, "Improving Routing in Sparse Mixture of Experts with Graph of Tokens". With A_h the
probabilities of head h of the attention before the layer, u_i that head's output, v_j its values and
p_j = softmax(W h_j),

    A'_ij ∝ A_hij N(u_i | v_j, σ² I),   rows sum to 1;   r_i = Σ_j A'_ij p_j,   h = h*

and the k best experts by r_i, weighed by r_i over its sum (moe/token_graph.py). A' is the posterior over the
source token j, seen the output u_i; posterior=false takes A itself. h* is the head with the lowest mean
attention entropy over tokens. Attention's kernels keep no probabilities, so the scores of h* are computed
again, in chunks: in log space log A'_ij = s q_i · k_j − |u_i − v_j|² / 2σ² + c_i, where whatever is
constant in j cancels.

Causality: A is causal. The head is chosen by a running mean of the entropies (a buffer, updated once after each
optimizer step) in evaluation, which is the causal form and the same in cached decoding: the cache keeps p_j
beside attention's keys and values. Training chooses it by the current micro-batch (head=batch), so
this one discrete choice sees later tokens and other sequences, without a gradient; head=running is causal there too.

Legend: B sequences, S new positions, L all positions so far, H heads, G key/value heads, C head width,
T tokens, D model, E experts, X width of the scores' factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2moe.moe.history import extend
from s2moe.moe.routers.base import LinearScores, Router, register
from s2moe.moe.routing import AttentionState, Routing, RoutingContext
from s2moe.moe.token_graph import GraphOptions, by_sequence, head_entropies, mix, renormalises, route
from s2moe.options import option
from s2moe.precision import full_precision


@dataclass(kw_only=True)
class AttentionAwareOptions(GraphOptions):
    """Options of ``router.name: attention_aware``."""

    posterior: bool = option(
        True, "weigh attention by how likely the head's output is given the other token's value; false: attention alone"
    )
    sigma: float = option(
        1.0, "standard deviation of that Gaussian likelihood, in each of a head's features", above=0, needs="posterior"
    )
    head: str = option(
        "batch",
        "by what training chooses the head of lowest attention entropy: batch: the current micro-batch; "
        "running: the mean over steps that evaluation goes by (causal in training too)",
        choices=("batch", "running"),
    )
    measure_every: int = option(
        1,
        "head=running: measure the entropies every so many steps, which costs all heads' scores once more",
        least=1,
        needs="head=running",
    )
    momentum: float = option(0.9, "of the running mean of the heads' entropies", least=0, below=1)
    num_attention_heads: int | None = option(None, "query heads of the attention; null: the model's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "batch" and self.measure_every != 1:
            raise ValueError("head=batch needs the entropies at every step: set head=running, or measure_every=1")


@register("attention_aware")
class AttentionAwareRouter(Router):
    """Each token takes the k best experts of the mixture of the distributions of tokens it attends to.

    Causal in evaluation. In training with head=batch the choice of the head, and nothing else, depends on the
    whole micro-batch.
    """

    Options = AttentionAwareOptions
    options: AttentionAwareOptions
    wants_attention = True
    keeps_history = True
    entropy_H: Tensor  # running mean of each head's attention entropy; zeros: not measured yet

    def __init__(
        self, hidden_size: int, num_experts: int, experts_per_token: int, options: AttentionAwareOptions
    ) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        self.renormalise = renormalises(options, experts_per_token)
        self.scores = LinearScores(hidden_size, num_experts)
        heads = options.num_attention_heads
        if heads is None or heads < 1:
            raise ValueError(
                f"num_attention_heads must be the number of the attention's query heads, got {heads}: a model's "
                "configuration fills it in, a layer by itself needs router.num_attention_heads"
            )
        self.register_buffer("entropy_H", torch.zeros(heads, dtype=torch.float32))

    def reset_parameters(self, std: float) -> None:
        if not self.entropy_H.is_meta:
            torch.nn.init.zeros_(self.entropy_H)

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices, attention = self.choices(context), context.attention
        if attention is None:
            raise ValueError("the router attention_aware needs context.attention, what the attention before computed")
        heads = attention.query_BHSC.shape[1]
        if heads != len(self.entropy_H):
            raise ValueError(f"num_attention_heads is {len(self.entropy_H)}, but the attention has {heads} query heads")
        logits_TE = self.scores(hidden_TD)
        prob_TE = logits_TE.softmax(-1)
        prob_BSE = by_sequence(prob_TE, context)
        prob_BLE, _ = extend(context.history, prob_BSE, prob_BSE[..., :0])  # nothing else to remember
        attention = _up_to(attention, prob_BLE.shape[1])

        entropy_H, feedback = self._entropies(attention, context)
        head = entropy_H.argmin(keepdim=True)  # an index on the device: nothing waits for it
        query_BSX, key_BLX, bias_BL = self._factors(attention, head)
        mixed_BSE = mix(query_BSX, key_BLX, bias_BL, prob_BLE, context, self.options)
        return route(
            mixed_BSE.reshape_as(prob_TE),
            logits_TE,
            prob_TE,
            choices,
            self.renormalise,
            self.options,
            context,
            self.training,
            {"head_entropy": entropy_H.index_select(0, head)[0].float()},
            feedback,
        )

    def _entropies(self, attention: AttentionState, context: RoutingContext) -> tuple[Tensor, Tensor | None]:
        """Mean entropies to choose the head by, [H], and the feedback: [H] sums and a number of tokens."""
        running = self.options.head == "running"
        if not self.training or (running and context.step % self.options.measure_every):
            return self.entropy_H, None
        if context.copy and "heads" in context.first_pass:  # S2MoE's noisy tokens come with the same attention
            measured = context.first_pass["heads"]
        else:
            measured = torch.cat(head_entropies(*attention[:2], attention.scaling, context, self.options.chunk))
            context.first_pass["heads"] = measured
        return self.entropy_H if running else _mean(measured), measured

    def _factors(self, attention: AttentionState, head: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """log A' = query_i · key_j + bias_j + what is constant in j, for the one head."""
        heads, groups = attention.query_BHSC.shape[1], attention.key_BGLC.shape[1]
        group = head // (heads // groups)
        query_BSC = full_precision(attention.query_BHSC.index_select(1, head)[:, 0]) * attention.scaling
        key_BLC = full_precision(attention.key_BGLC.index_select(1, group)[:, 0])
        if not self.options.posterior:
            return query_BSC, key_BLC, None
        # −|u − v|² / 2σ² = (u · v − |v|² / 2) / σ² − |u|² / 2σ²
        precision = self.options.sigma**-2
        out_BSC = full_precision(attention.out_BSHC.index_select(2, head)[:, :, 0])
        value_BLC = full_precision(attention.value_BGLC.index_select(1, group)[:, 0])
        bias_BL = -precision / 2 * value_BLC.square().sum(-1)
        return torch.cat((query_BSC, precision * out_BSC), -1), torch.cat((key_BLC, value_BLC), -1), bias_BL

    @torch.no_grad()
    def after_step(self, feedback: Tensor) -> None:
        """Move the running mean towards this step's; the first measurement is taken as it is."""
        weight = 1 - self.options.momentum * self.entropy_H.any().to(self.entropy_H.dtype)
        self.entropy_H.lerp_(_mean(feedback).to(self.entropy_H.dtype), weight)


def _up_to(attention: AttentionState, keys: int) -> AttentionState:
    """Without the places that a cache of fixed size has not filled yet."""
    return attention._replace(key_BGLC=attention.key_BGLC[:, :, :keys], value_BGLC=attention.value_BGLC[:, :, :keys])


def _mean(measured: Tensor) -> Tensor:
    return measured[:-1] / measured[-1].clamp(min=1)
