"""Routing over a graph of tokens: each token's expert distribution is a mixture of those of tokens it resembles.

Nguyen et al. 2025, "Improving Routing in Sparse Mixture of Experts with Graph of Tokens". With
p_j = softmax(W h_j) the linear router's distribution and A a row-stochastic matrix over positions,

    r_i = Σ_j A_ij p_j

decides instead of p_i: the k best experts are chosen by r, and weighed by it. Probabilities are
mixed, not logits, and before the top-k: r_i is a distribution too, as the paper's argument about its entropy needs.
Where A comes from is the router's matter: routers/similarity_aware.py, routers/attention_aware.py. Both give

    A_ij = softmax over j of (query_i · key_j + bias_j),   j ≤ i, not padding

so that all of A that ever exists is a chunk of rows, at most [B, R, L].

Legend: B sequences, S new positions, L all positions so far (the new ones last), R rows of a chunk, X width of
queries and keys, T = B S tokens, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from s2moe.moe.assignments import load_of, mean_entropy, per_token
from s2moe.moe.balancing import BalanceOptions, balance_terms, weigh
from s2moe.moe.history import visible
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.options import option
from s2moe.precision import full_precision

TIE = 1e-5  # nats: entropies closer than this are equal, so that rounding does not decide over an edge


@dataclass(kw_only=True)
class GraphOptions(BalanceOptions):
    """Options that both routers over a graph of tokens have."""

    renormalise: bool | None = option(
        None,
        "divide a token's weights by their sum, as published. null: where k > 1, since at k=1 every weight would be 1 "
        "and the router would get no gradient (true is refused there)",
    )
    stop_gradient: bool = option(False, "treat the graph's weights A as constants in the backward pass")
    stop_neighbours: bool = option(
        False, "a token's routing trains its own scores alone, not those of the tokens it mixes in"
    )
    chunk: int | None = option(
        256,
        "rows of A computed at once. Where a sequence is longer, each chunk is computed again in the backward pass "
        "instead of being kept: memory linear in the sequence, for a second forward of the mixing. null: all at once",
        least=1,
    )


def renormalises(options: GraphOptions, experts_per_token: int) -> bool:
    """Whether weights are divided by their sum, by the trained number of experts per token.

    Raises:
        ValueError: if they would be constantly 1.
    """
    if options.renormalise and experts_per_token == 1:
        raise ValueError(
            "renormalise=true with experts_per_token=1 makes every weight 1, so the router would get no gradient "
            "from the task: set renormalise to null or false"
        )
    return experts_per_token > 1 if options.renormalise is None else options.renormalise


def mask_of(context: RoutingContext, keys: int) -> Tensor | None:
    """The mask over ``keys`` positions: as the model was given it, or of the padding a lone layer was told of."""
    if context.attention_mask is not None or context.mask_T is None:
        return context.attention_mask
    mask_BS = context.mask_T.view(context.sequences, -1)
    if mask_BS.shape[1] != keys:
        raise ValueError(f"mask_T covers {mask_BS.shape[1]} positions of {keys}: give the attention_mask of all")
    return mask_BS


def by_sequence(value_TX: Tensor, context: RoutingContext) -> Tensor:
    """[T, X] as [B, S, X]."""
    return value_TX.unflatten(0, (context.sequences, len(value_TX) // context.sequences))


def chunks(rows: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive chunks; one, empty, where there are no rows."""
    step = chunk or max(rows, 1)
    for start in range(0, max(rows, 1), step):
        yield start, min(start + step, rows)


def mix(
    query_BSX: Tensor,
    key_BLX: Tensor,
    bias_BL: Tensor | None,
    prob_BLE: Tensor,
    context: RoutingContext,
    options: GraphOptions,
    window: int | None = None,
    entropy_bound: bool = False,
) -> Tensor:
    """r_i = Σ_j softmax_j(query_i · key_j + bias_j) p_j over the positions j that i may look at, [B, S, E].

    Args:
        window: only the last so many positions, a token's own among them; None: all.
        entropy_bound: only positions whose p_j is not less certain than p_i: H(p_j) ≤ H(p_i).
    """
    queries, keys, device = query_BSX.shape[1], key_BLX.shape[1], query_BSX.device
    past, mask = keys - queries, mask_of(context, keys)
    entropy_BL = torch.special.entr(prob_BLE.detach()).sum(-1) if entropy_bound else None

    def rows(start: int, stop: int, query_BSX: Tensor, key_BLX: Tensor, prob_BLE: Tensor) -> Tensor:
        new, own = slice(start, stop), slice(past + start, past + stop)
        first = max(0, own.start - window + 1) if window else 0
        seen = slice(first, own.stop)  # no row of this chunk looks at any other position
        edge_BRL = visible(mask, new, keys, queries, device)[..., seen]
        if window:
            position_L = torch.arange(keys, device=device)
            edge_BRL = edge_BRL & (position_L[own, None] - position_L[seen] < window)
        if entropy_BL is not None:
            edge_BRL = edge_BRL & (entropy_BL[:, None, seen] <= entropy_BL[:, own, None] + TIE)
        with torch.autocast(device.type, enabled=False):
            score_BRL = query_BSX[:, new] @ key_BLX[:, seen].mT
            if bias_BL is not None:
                score_BRL = score_BRL + bias_BL[:, None, seen]
            weight_BRL = score_BRL.masked_fill(~edge_BRL, -torch.inf).softmax(-1)
            if options.stop_gradient:
                weight_BRL = weight_BRL.detach()
            if not options.stop_neighbours:
                return weight_BRL @ prob_BLE[:, seen]
            # Zero in value, a token's own share of the gradient.
            own_BR = weight_BRL.diagonal(own.start - first, 1, 2)
            own_BRE = prob_BLE[:, own]
            return weight_BRL @ prob_BLE[:, seen].detach() + own_BR[..., None] * (own_BRE - own_BRE.detach())

    parts = list(chunks(queries, options.chunk))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([rows(*part, query_BSX, key_BLX, prob_BLE) for part in parts], 1)
    return torch.cat(
        [
            checkpoint(rows, *part, query_BSX, key_BLX, prob_BLE, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ],
        1,
    )


@torch.no_grad()
def head_entropies(
    query_BHSC: Tensor, key_BGLC: Tensor, scaling: float, context: RoutingContext, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Sum over real tokens of each head's attention entropy in nats, [H], and the number of those tokens, [1].

    All heads' scores once more, O(H S L C): the price of an attention that keeps no probabilities.
    """
    batch, heads, queries, width = query_BHSC.shape
    groups, keys = key_BGLC.shape[1], key_BGLC.shape[2]
    mask = mask_of(context, keys)
    query_BGPSC = query_BHSC.view(batch, groups, -1, queries, width)  # P query heads share a key head
    key_BG1CL = full_precision(key_BGLC)[:, :, None].mT
    real_BS = query_BHSC.new_ones(batch, queries, dtype=torch.bool)
    if context.mask_T is not None:
        real_BS = context.mask_T.view(batch, queries)
    total_H = torch.zeros(heads, dtype=key_BG1CL.dtype, device=key_BG1CL.device)
    for start, stop in chunks(queries, None if chunk is None else max(1, chunk // heads)):
        seen_BRL = visible(mask, slice(start, stop), keys, queries, query_BHSC.device)
        with torch.autocast(query_BHSC.device.type, enabled=False):
            score_BGPRL = full_precision(query_BGPSC[..., start:stop, :]) @ key_BG1CL * scaling
            prob_BGPRL = score_BGPRL.masked_fill(~seen_BRL[:, None, None], -torch.inf).softmax(-1)
            entropy_BHR = torch.special.entr(prob_BGPRL).sum(-1).view(batch, heads, stop - start)
        total_H += (entropy_BHR * real_BS[:, None, start:stop]).sum((0, 2))
    return total_H, real_BS.sum().to(total_H.dtype)[None]


def route(
    mixed_TE: Tensor,
    logits_TE: Tensor,
    prob_TE: Tensor,
    choices: int,
    renormalise: bool,
    options: GraphOptions,
    context: RoutingContext,
    training: bool,
    stats: dict[str, Tensor] | None = None,
    feedback: Tensor | None = None,
) -> Routing:
    """The k best experts by r, their weights, and in training the balance loss on r and z-loss on the logits."""
    expert_TK = mixed_TE.detach().topk(choices, dim=-1).indices
    weight_TK = mixed_TE.gather(-1, expert_TK)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    load_E = load_of(expert_TK, mixed_TE.shape[1], context.mask_T)
    losses: dict[str, Tensor] = {}
    # To be held against router_entropy, that of r, which the method claims to be the lower.
    stats = {"linear_entropy": mean_entropy(prob_TE, context.mask_T), **(stats or {})}
    if training:
        losses, values = weigh(options, balance_terms(options, logits_TE, mixed_TE, load_E, context))
        stats |= values
    return per_token(expert_TK, weight_TK, mixed_TE, context, losses, stats, load_E, feedback)
