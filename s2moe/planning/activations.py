"""Bytes that a forward pass keeps for its backward pass, counted from what the model's code saves.

Everything is counted for one micro-batch on one process, each tensor once, however many operations keep it.
tests/planning compares the counts with what autograd really saves, for every method of model.moe.method. Left
out is what does not grow with the tokens: samples of the regularisers, cosines of positions.

Legend: T tokens, D model, F expert hidden, N assignments, R rows received, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from s2moe.models.configuration import S2MoEConfig
from s2moe.moe.config import MoEConfig
from s2moe.training.plan import BYTES

FULL, INDEX = 4, 8  # bytes of a float32, which routers and losses compute in, and of an index
SCORES = 2  # [T, E] float32 tensors that a router keeps: its distribution, and one more where there is noise
LISTS = 4  # indices of each assignment: its token, its place and back, its choice


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes at a time.

    Args:
        imbalance: rows that the busiest rank's experts receive, over the mean.
        fused: whether norms, dropout and expert products are single kernels, as on a GPU. They keep other tensors
            than the loops on a CPU.
    """

    sequences: int
    length: int
    precision: str
    expert_parallel: int = 1
    imbalance: float = 1.0
    fused: bool = True
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def size(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.precision]


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Args:
        attention: with the norms and dropout of all layers, and the final norm.
        dense: MLPs of dense layers, shared experts.
        routing: routers, S2MoE's noise and mixture.
        experts, rows: within the experts; the rows that go to and come from them, with their indices.
        output: the logits, which live as long as the model's output.
        logits: they, the log-probabilities for the loss, and the gradients of both.
        dispatch: beyond what is kept, the rows underway in one layer.
        workspace: of one layer's backward: gradients of its experts' weights before they are added up, of what is
            within the experts, and of hidden states.
        recomputed: with activation checkpointing, one layer in full; else 0.
    """

    attention: float
    dense: float
    routing: float
    experts: float
    rows: float
    output: float
    logits: float
    dispatch: float
    workspace: float
    recomputed: float

    @property
    def largest(self) -> float:
        """The most at once: at the loss all of the logits, in a layer's backward what passes through it."""
        return self.kept + max(self.logits, self.output + self.recomputed + self.dispatch + self.workspace)

    @property
    def kept(self) -> float:
        """What autograd keeps of all layers."""
        return self.attention + self.dense + self.routing + self.experts + self.rows


def activations(model: S2MoEConfig, micro: MicroBatch) -> Activations:
    """What one micro-batch keeps: with activation checkpointing each layer's input alone, and one layer in full."""
    moe = model.moe_config()
    sparse = [moe.is_sparse(layer) for layer in range(model.num_hidden_layers)]
    layers, count = len(sparse), sum(sparse)
    attention = _attention(model, micro)
    dense_mlp = _mlp(model.intermediate_size, moe, micro)
    shared = _mlp(moe.shared_experts * moe.expert_hidden, moe, micro)
    routing = _routing(model, moe, micro)
    experts, rows, underway = _experts(model, moe, micro)
    ends = _norm(model, micro) + _dropout(model, micro)
    output, logits = _logits(model, micro)
    workspace = _workspace(model, moe, micro, count)
    dispatch = underway if count else 0.0
    if micro.checkpointing:
        of_sparse = attention + shared + routing + experts + rows
        largest = max(of_sparse if count else 0.0, attention + dense_mlp if count < layers else 0.0)
        inputs = layers * micro.tokens * model.hidden_size * micro.size
        return Activations(inputs + ends, 0.0, 0.0, 0.0, 0.0, output, logits, dispatch, workspace, largest)
    return Activations(
        attention=layers * attention + ends,
        dense=(layers - count) * dense_mlp + count * shared,
        routing=count * routing,
        experts=count * experts + _competitions(moe, micro, count),
        rows=count * rows,
        output=output,
        logits=logits,
        dispatch=dispatch,
        workspace=workspace,
        recomputed=0.0,
    )


def _norm(model: S2MoEConfig, micro: MicroBatch) -> float:
    """Input and output; the loop form keeps input and normalised input in float32 instead of the former."""
    inside = micro.size if micro.fused else 2 * FULL
    return micro.tokens * (model.hidden_size * (inside + micro.size) + (FULL if micro.fused else 0))


def _dropout(model: S2MoEConfig, micro: MicroBatch) -> float:
    """The mask."""
    if not model.hidden_dropout:
        return 0.0
    return float(micro.tokens * model.hidden_size * (1 if micro.fused else micro.size))


def _attention(model: S2MoEConfig, micro: MicroBatch) -> float:
    """Two norms and dropouts; query, key, value, output, and a number for each head, without any [S, S] matrix."""
    heads = model.attention_shape()
    width = 2 * (heads.query_heads + heads.value_heads) * heads.width
    attended = micro.tokens * (width * micro.size + heads.query_heads * FULL)
    return 2 * _norm(model, micro) + 2 * _dropout(model, micro) + attended


def _mlp(width: int, moe: MoEConfig, micro: MicroBatch) -> float:
    """gated: both factors, the activation and the product; mlp: before and after the activation."""
    return float(micro.tokens * width * micro.size * (4 if moe.expert_form == "gated" else 2))


def _routing(model: S2MoEConfig, moe: MoEConfig, micro: MicroBatch) -> float:
    passes = 2 if moe.stochastic.enabled else 1
    wide = 0.0  # float32 copies [T, D]
    if micro.size < FULL:
        wide += passes  # what is routed
    if moe.stochastic.enabled:
        wide += 2  # the noise, and the root of its variance
        wide += 1 if micro.size == FULL else 2  # the noisy tokens; in half precision the gate's and the noise's input
    outputs = 2 * micro.size if moe.stochastic.enabled else 0  # of clean and noisy tokens, for the gate
    scores = passes * SCORES * moe.num_experts * FULL
    sampled = min(moe.stochastic.samples, micro.tokens) if moe.stochastic.enabled else 0  # compared by InfoNCE
    contrast = sampled * (4 * model.hidden_size + sampled) * FULL
    return micro.tokens * (model.hidden_size * (wide * FULL + outputs) + scores) + contrast


def _experts(model: S2MoEConfig, moe: MoEConfig, micro: MicroBatch) -> tuple[float, float, float]:
    """Within the experts, rows and indices, and rows underway of one SMoE layer."""
    row = model.hidden_size * micro.size
    assignments, received = _assignments(moe, micro)
    experts = received * _hidden(moe, micro)
    rows = received * row + LISTS * INDEX * assignments
    underway = 2.0 * assignments * row  # gathered, and computed
    if micro.expert_parallel > 1:
        rows += assignments * row + LISTS * INDEX * received  # what came back, for the gradient of the weights
        underway = (2 * assignments + 2 * received) * row  # sent, received, computed, returned
    elif moe.regularisers.cka_loss:
        rows += assignments * row
    return experts, rows, underway


def _assignments(moe: MoEConfig, micro: MicroBatch) -> tuple[float, float]:
    """Rows that one process' tokens send to experts, and that its own experts receive."""
    sent = float(micro.tokens * moe.experts_per_token * (2 if moe.stochastic.enabled else 1))
    return sent, sent * (micro.imbalance if micro.expert_parallel > 1 else 1.0)


def _hidden(moe: MoEConfig, micro: MicroBatch) -> float:
    """Bytes kept of one row within an expert. The loop keeps what stands before the activation and no more."""
    if moe.expert_form == "gated":
        count = 5 if micro.fused else 2
    else:
        count = 3 if micro.fused else 1
    return float(count * moe.expert_hidden * micro.size)


def _competitions(moe: MoEConfig, micro: MicroBatch, sparse: int) -> float:
    """The losers of the most competitions that one step can hold (CompeteSMoE): the peak, not the mean."""
    if not moe.competition.enabled or not moe.competition.rate:
        return 0.0
    losers = micro.tokens * (moe.num_experts - moe.experts_per_token)
    return min(moe.competition.max_layers, sparse) * losers * _hidden(moe, micro)


def _workspace(model: S2MoEConfig, moe: MoEConfig, micro: MicroBatch, sparse: int) -> float:
    numbers = 2.0 * micro.tokens * model.hidden_size
    if sparse:
        gated = moe.expert_form == "gated"
        weights = (3 if gated else 2) * model.hidden_size * moe.expert_hidden * moe.num_experts
        _, rows = _assignments(moe, micro)
        if not micro.fused:  # the loop holds one expert's at a time, perhaps one with twice its share
            rows *= min(1.0, 2 / moe.num_experts)
        within = (3 if micro.fused else 5) if gated else (2 if micro.fused else 3)
        numbers += weights / micro.expert_parallel + within * rows * moe.expert_hidden
    return numbers * micro.size


def _logits(model: S2MoEConfig, micro: MicroBatch) -> tuple[float, float]:
    """The logits; they, their log-softmax in float32, and the gradients of the loss by both."""
    numbers = float(micro.tokens * model.vocab_size)
    return numbers * micro.size, numbers * (micro.size + 3 * FULL)
