"""The published methods, each a name for a set of defaults: ``model.moe.method=<name>``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A published method.

    ``summary`` is the line that ``--list-methods`` prints; ``settings`` are defaults below the user's own, or a
    function that makes them from the number of experts. ``any_router``: the method is something around a router, which
    the user may exchange; the settings of ``router`` are for the one they name. Without it, the method is a way of
    routing itself.
    """

    summary: str
    settings: dict[str, Any] | Callable[[int], dict[str, Any]]
    any_router: bool = False

    def defaults(self, num_experts: int) -> dict[str, Any]:
        """The settings for a layer of so many experts."""
        return self.settings(num_experts) if callable(self.settings) else self.settings


LOSS_FREE = {"name": "topk", "combine": "sigmoid", "bias_update_rate": 1e-3, "balance_loss": 0.0}

METHODS: dict[str, Method] = {
    "smoe": Method(
        "sparse mixture of experts: linear top-k routing with Switch's balance loss",
        {"router": {"name": "topk"}},
        any_router=True,
    ),
    "switch": Method(
        "Switch Transformer: one expert, weight P not renormalised, jitter, capacity 1.25 in training",
        {
            "experts_per_token": 1,
            "router": {"name": "topk", "noise": "jitter", "jitter": 0.01, "capacity_factor": 1.25},
        },
    ),
    "gshard": Method(
        "GShard: top-2 renormalised, second expert at random by its weight, capacity 2 T / E, balance by first choices",
        {
            "experts_per_token": 2,
            "router": {
                "name": "topk",
                "renormalise": True,
                "second_choice": "random",
                "capacity_factor": 1.0,
                "balance_form": "gshard",
            },
        },
    ),
    "noisy_topk": Method(
        "Shazeer's noisy top-k: learned noise, softmax over the chosen logits, importance and load losses",
        {
            "experts_per_token": 2,
            "router": {
                "name": "topk",
                "combine": "topk_then_softmax",
                "noise": "shazeer",
                "zero_init": True,
                "balance_loss": 0.0,
                "importance_loss": 0.1,
                "load_loss": 0.1,
            },
        },
    ),
    "loss_free": Method(
        "auxiliary-loss-free balancing: a selection bias follows the load after every step; sigmoids as weights",
        {"experts_per_token": 2, "router": LOSS_FREE},
    ),
    "deepseek_v3": Method(
        "DeepSeek-V3: loss_free, weights summing to 2.5, a tiny balance loss within sequences, one shared expert",
        {
            "experts_per_token": 2,
            "shared_experts": 1,
            # Technical report (arXiv 2412.19437): eq. 13 renormalises, section 4.2 has alpha and u. The scale is
            # routed_scaling_factor of the published config.json.
            "router": {**LOSS_FREE, "renormalise": True, "scale": 2.5, "sequence_loss": 1e-4},
        },
    ),
    "xmoe": Method(
        "X-MoE: cosine scores in E/2 dimensions, learned temperature, softmax gate, one expert",
        {"experts_per_token": 1, "router": {"name": "xmoe", "gate": "softmax"}},
    ),
    "xmoe_sigmoid": Method(
        "X-MoE with the sigmoid gate (temperatures 0.07)",
        {"experts_per_token": 1, "router": {"name": "xmoe", "gate": "sigmoid"}},
    ),
    "stablemoe": Method(
        "StableMoE: one expert, learned for a tenth of the run, then routed by a frozen distillate on token ids",
        {"experts_per_token": 1, "router": {"name": "stablemoe"}},
    ),
    "smoe_dropout": Method(
        "SMoE-Dropout: frozen random router, from half of the experts per token to all of them over the run",
        lambda num_experts: {"experts_per_token": num_experts, "router": {"name": "smoe_dropout"}},
    ),
    "frozen_random": Method(
        "frozen random router with a fixed number of experts per token (some papers' 'SMoE-Dropout' baseline)",
        {"experts_per_token": 2, "router": {"name": "smoe_dropout", "schedule": "constant"}},
    ),
    "compete_smoe": Method(
        "CompeteSMoE: in 7 % of the steps all experts of a layer compete for each token, and the router learns from it",
        {
            "experts_per_token": 2,
            # Renormalised as in the published code: then a competition's output has the scale of the router's.
            "router": {"name": "topk", "renormalise": True, "balance_loss": 0.01, "z_loss": 0.001},
            "competition": {"enabled": True},
        },
    ),
    "usmoe": Method(
        "USMoE: the best (token, expert) pairs of a sequence, by softmax mixed with sigmoid; threshold inference",
        {"experts_per_token": 2, "router": {"name": "usmoe"}},
    ),
    "expert_choice": Method(
        "Expert Choice: every expert takes equally many tokens of the micro-batch; threshold inference",
        {"experts_per_token": 2, "router": {"name": "expert_choice"}},
    ),
    "simsmoe": Method(
        "SimSMoE: top-2 with a loss on the similarity (CKA) of experts that share tokens",
        {"experts_per_token": 2, "router": {"name": "topk"}, "regularisers": {"cka_loss": 0.01}},
        any_router=True,
    ),
    "snnl_smoe": Method(
        "top-2 whose hidden states are conditioned by the soft nearest neighbour loss of the next symbol",
        {"experts_per_token": 2, "router": {"name": "topk"}, "regularisers": {"snnl_loss": 0.1}},
        any_router=True,
    ),
    "sample_similarity": Method(
        "top-2 with the sample similarity loss: similar tokens to the same experts, dissimilar ones to others",
        {
            "experts_per_token": 2,
            "router": {"name": "topk", "balance_loss": 0.0},
            "regularisers": {"similarity_loss": 0.1},
        },
        any_router=True,
    ),
    "importance": Method(
        "top-2 balanced by the importance loss: CV^2 of each expert's summed probability",
        {
            "experts_per_token": 2,
            "router": {"name": "topk", "balance_loss": 0.0},
            "regularisers": {"gate_importance_loss": 0.1},
        },
        any_router=True,
    ),
    "ssr": Method(
        "Selective Sinkhorn Routing: top-2; 1 % of a layer's training steps route by a balanced transport plan",
        {"experts_per_token": 2, "router": {"name": "ssr"}},
    ),
    "sbase": Method(
        "S-BASE: one expert, in training that of a balanced transport plan; weight sigmoid of its logit",
        {"experts_per_token": 1, "router": {"name": "sbase"}},
    ),
    "base": Method(
        "BASE layers: one expert, in training by an assignment that gives all equally many tokens; sigmoid gate",
        {"experts_per_token": 1, "router": {"name": "base"}},
    ),
    "vmoe": Method(
        "V-MoE: top-2 of a noisy softmax, not renormalised, capacity 1.05 in training, importance and load losses",
        {"experts_per_token": 2, "shared_start": True, "router": {"name": "vmoe"}},
    ),
    "s2moe": Method(
        "S2MoE, flop-matched: one expert for each token and one for its noisy copy, gate, InfoNCE",
        {"experts_per_token": 1, "router": {"name": "topk"}, "stochastic": {"enabled": True}},
        any_router=True,
    ),
    "s2moe_k2": Method(
        "S2MoE with two experts on each of the two paths: twice the expert FLOPs of top-2 in training",
        {"experts_per_token": 2, "router": {"name": "topk"}, "stochastic": {"enabled": True}},
        any_router=True,
    ),
    "momentum_smoe": Method(
        "MomentumSMoE: SMoE layers as heavy-ball steps, with a velocity carried from layer to layer",
        {"router": {"name": "topk"}, "momentum": {"kind": "heavy_ball"}},
        any_router=True,
    ),
    "adam_smoe": Method(
        "AdamSMoE: Adam's step in the first SMoE layer, heavy balls after it",
        {"router": {"name": "topk"}, "momentum": {"kind": "adam"}},
        any_router=True,
    ),
    "robust_momentum_smoe": Method(
        "Robust MomentumSMoE: the Robust Momentum Method, experts evaluated ahead along the velocity",
        {"router": {"name": "topk"}, "momentum": {"kind": "robust"}},
        any_router=True,
    ),
    "similarity_aware": Method(
        "Similarity-Aware SMoE: experts by a mixture of the distributions of earlier tokens with similar hidden states",
        {"router": {"name": "similarity_aware"}},
    ),
    "attention_aware": Method(
        "Attention-Aware SMoE: experts by a mixture of the distributions of tokens that the sharpest head attends to",
        {"router": {"name": "attention_aware"}},
    ),
}
