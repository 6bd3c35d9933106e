"""Similarity-Aware routing: tokens with similar hidden states share their expert distributions.

Nguyen et al. 2025, "Improving Routing in Sparse Mixture of Experts with Graph of Tokens". With u_i the layer's
inputs and p_j = softmax(W u_j),

    S_ij = softmax over j ≤ i of (u_i W_s u_jᵀ / τ),   r_i = Σ_j S_ij p_j

and the k best experts by r_i, weighed by r_i over its sum (moe/token_graph.py). W_s is learned, [D, D] or of
rank R. It is kept as W_s = Pᵀ Q / R, starting at P = Q = the identity's first R rows (a full W_s has R = D and
a fixed Q): the similarity of an RMS-normalised input with itself starts near 1, that of unrelated ones near 0,
whatever the width. So τ is that of a softmax over cosines, and 1/8 starts a token with most of its own
distribution and a share of those it resembles. The paper's bound H(r_i) ≤ H(p_i), for τ towards 0, wants j
restricted to tokens with H(p_j) ≤ H(p_i) (option entropy_bound); in practice all tokens are used.

Causality: S runs over each sequence's own and earlier positions, so training is causal as evaluation is. In
cached decoding each position leaves u_j (or Q u_j) and p_j in the cache.

Legend: T tokens, B sequences, S new positions, L all positions so far, D model, E experts, R rank of W_s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2moe.moe.history import extend
from s2moe.moe.routers.base import LinearScores, Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.token_graph import GraphOptions, by_sequence, mix, renormalises, route
from s2moe.options import option
from s2moe.precision import full_precision, linear


@dataclass(kw_only=True)
class SimilarityAwareOptions(GraphOptions):
    """Options of ``router.name: similarity_aware``."""

    temperature: float = option(0.125, "tau: low mixes in the most similar tokens only, high all alike", above=0)
    rank: int | None = option(
        None, "rank of W_s; null: a full matrix. What decoding keeps of a token is as wide", least=1, most=2**20
    )
    window: int | None = option(
        None, "mix over the last so many positions only; null: over the whole sequence", least=1
    )
    entropy_bound: bool = option(
        False, "mix in only tokens whose own distribution is not less certain: H(p_j) <= H(p_i)"
    )


@register("similarity_aware")
class SimilarityAwareRouter(Router):
    """Each token takes the k best experts of the mixture of its own and earlier tokens' distributions.

    Causal in training and evaluation: a token's choice depends on its own and earlier positions of its sequence.
    """

    Options = SimilarityAwareOptions
    options: SimilarityAwareOptions
    keeps_history = True

    def __init__(
        self, hidden_size: int, num_experts: int, experts_per_token: int, options: SimilarityAwareOptions
    ) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        self.renormalise = renormalises(options, experts_per_token)
        self.scores = LinearScores(hidden_size, num_experts)
        if options.rank is not None and options.rank > hidden_size:
            raise ValueError(f"rank must not exceed the model's width {hidden_size}, got {options.rank}")
        self.rank = options.rank or hidden_size
        self.query_RD = nn.Parameter(torch.empty(self.rank, hidden_size))
        self.key_RD = nn.Parameter(torch.empty(self.rank, hidden_size)) if options.rank else None
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        nn.init.eye_(self.query_RD)
        if self.key_RD is not None:
            nn.init.eye_(self.key_RD)

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices = self.choices(context)
        logits_TE = self.scores(hidden_TD)
        prob_TE = logits_TE.softmax(-1)
        query_TR = linear(hidden_TD, self.query_RD) / (self.rank * self.options.temperature)
        # Inputs are remembered as they came, in the model's precision.
        key_TR = hidden_TD if self.key_RD is None else linear(hidden_TD, self.key_RD)
        key_BLR, prob_BLE = extend(context.history, by_sequence(key_TR, context), by_sequence(prob_TE, context))
        mixed_BSE = mix(
            by_sequence(query_TR, context),
            full_precision(key_BLR),
            None,
            prob_BLE,
            context,
            self.options,
            self.options.window,
            self.options.entropy_bound,
        )
        mixed_TE = mixed_BSE.reshape_as(prob_TE)
        return route(mixed_TE, logits_TE, prob_TE, choices, self.renormalise, self.options, context, self.training)
