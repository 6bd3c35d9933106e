"""Parameters, FLOPs and memory of a model, counted from its configuration without building it.

One multiply-accumulate is two FLOPs. Training costs three times the forward pass (each product has
two gradients). Counted are the matrix products: projections, attention, experts, routers, output.
"""

from __future__ import annotations

from dataclasses import dataclass

from s2moe.models.configuration import S2MoEConfig, meta_router


@dataclass(frozen=True)
class ModelSizes:
    """Parameter counts by kind, and the multiply-accumulates of one token."""

    embedding: int  # input and (untied) output embedding
    attention: int
    dense: int  # MLPs of dense layers, shared experts
    experts: int  # routed experts, all of them
    router: int  # routers, and S2MoE's gates
    norm: int
    active_experts: int  # routed experts that one token meets in inference
    macs_per_token: int  # one clean forward pass, without attention's score and value products
    training_macs_per_token: int  # with S2MoE's noisy pass, competitions and a k schedule, averaged over a run
    attention_macs_per_position: int  # score and value products of one token with one earlier position

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.attention + self.dense + self.experts + self.router + self.norm

    @property
    def active(self) -> int:
        """Parameters that take part in one token's inference."""
        return self.total - self.experts + self.active_experts

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of one token's training step (forward and backward) at this sequence length.

        Attention sees half the sequence on average. Recomputed activations are not counted.
        """
        attention = self.attention_macs_per_position * sequence_length // 2
        return 6 * (self.training_macs_per_token + attention)

    def inference_macs_per_token(self, context_length: int) -> int:
        """Multiply-accumulates of one token's forward pass with so many positions of context."""
        return self.macs_per_token + self.attention_macs_per_position * context_length


def model_sizes(config: S2MoEConfig, experts_per_token: float | None = None) -> ModelSizes:
    """Count ``config``'s model; ``experts_per_token`` is the k' of a slimmed inference."""
    moe = config.moe_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    sparse = sum(moe.is_sparse(layer) for layer in range(layers))
    router = meta_router(moe, width)
    choices = experts_per_token or router.mean_choices(training=False)
    training_choices = experts_per_token or router.mean_choices(training=True)
    matrices = 3 if moe.expert_form == "gated" else 2
    bias = 0 if moe.expert_form == "gated" else 1
    out_bias = width if moe.expert_form == "mlp_biases" else 0

    heads = config.attention_shape()
    heads_width = heads.query_heads * heads.width
    attention = layers * width * 2 * (heads_width + heads.value_heads * heads.width)
    dense_mlp = (layers - sparse) * ((matrices * width + bias) * config.intermediate_size + out_bias)
    shared = sparse * (moe.shared_experts * (matrices * width + bias) * moe.expert_hidden)
    shared += sparse * out_bias * (moe.shared_experts > 0)
    expert = (matrices * width + bias) * moe.expert_hidden + out_bias
    router_parameters = sum(parameter.numel() for parameter in router.parameters())
    gate = (width + 1) if moe.stochastic.enabled else 0
    head = config.vocab_size * width

    one_expert_macs = sparse * matrices * width * moe.expert_hidden
    router_macs = sparse * router.macs_per_token()
    # Biases are parameters and no products.
    dense_macs = (
        matrices
        * width
        * ((layers - sparse) * config.intermediate_size + sparse * moe.shared_experts * moe.expert_hidden)
    )
    other_macs = attention + dense_macs + head
    passes = 2 if moe.stochastic.enabled else 1
    training_macs = other_macs + passes * (round(training_choices * one_expert_macs) + router_macs)
    losers = (moe.num_experts - training_choices) * matrices * width * moe.expert_hidden  # a competition computes them
    competition_macs = round(moe.competition.layers_per_step(sparse) * losers)
    return ModelSizes(
        embedding=head * (1 if config.tie_word_embeddings else 2),
        attention=attention,
        dense=dense_mlp + shared,
        experts=sparse * moe.num_experts * expert,
        router=sparse * (router_parameters + gate),
        norm=(2 * layers + 1 + (sparse if moe.momentum.legacy_double_residual else 0)) * width,
        active_experts=round(sparse * choices * expert),
        macs_per_token=other_macs + round(choices * one_expert_macs) + router_macs,
        training_macs_per_token=training_macs + competition_macs,
        attention_macs_per_position=layers * 2 * heads_width,
    )
