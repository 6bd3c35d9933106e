"""SimSMoE: experts that see the same tokens must not represent them alike.

Do et al. 2025, "SimSMoE: Toward Efficient Training Mixture of Experts via Solving Representational Collapse". Experts
i, j that share tokens of a micro-batch have outputs Z_i, Z_j on them; pairs that differ enough are left alone:

    published    L_sim = Σ over pairs that are due, with CKA(V Z_i, V Z_j) ≥ T*, of CKA(V Z_i, V Z_j)
    batch_mean   L_sim = mean over pairs with more than f* shared tokens, and CKA(Z_i, Z_j) ≥ T*, of CKA(Z_i, Z_j)

with RBF kernels (objectives/cka.py). ``published`` follows the authors' code: V ∈ R^{E×D} is learned (the paper: a
projection head), the kernels' width is σ itself, a pair is due once in f* micro-batches' worth of shared tokens.
``batch_mean`` takes the outputs as they are, a width of σ median distances, so that no scale counts, and any pair in
every micro-batch.

Deliberately otherwise than in the authors' code:

* They add up a pair's shares of the micro-batches' tokens, compare it where the sum exceeds f*, and begin anew. Here it
  is due with probability share / f*: as often, without a state for ranks and resumed runs to agree on.
* They compute the experts' outputs again, from hidden states that are constants. Here they are those of the mixture,
  so that the loss's gradient goes on to the hidden states.
* Of the E (E − 1) / 2 pairs at most ``pairs`` are compared, those that share most, and a sample of their tokens: a
  kernel costs tokens squared. ``published`` leaves out pairs with two shared tokens or less, whose CKA is always 1.
* Their T* is to be exceeded, not reached; their projection has a bias, which centring takes away; they sum over
  layers, where all losses here are averaged.

Needs tokens with two experts or more.

Legend: T tokens, D model, E experts, N assignments, P pairs, M sampled tokens of a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.moe.routing import Routing, RoutingContext
from s2moe.objectives.cka import alignment, rbf_kernel
from s2moe.precision import linear

LEAST_SHARED = 2  # tokens, of which CKA is 1 in any case


def pair_similarity_loss(
    rows_ND: Tensor,
    routing: Routing,
    context: RoutingContext,
    sigma: float,
    threshold: float,
    shared: float,
    pairs: int,
    samples: int,
    projection_ED: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_sim (0 where no pair counts), and figures for the log: how many pairs were compared, their CKA, those above T*.

    Args:
        rows_ND: each assignment's expert output, without its weight, in the order of the routing's list.
        sigma: of the RBF kernel.
        threshold: T*.
        shared: f*: published: micro-batches' worth of shared tokens; batch_mean: pairs that share no more tokens than
            this do not count.
        pairs: at most so many pairs are compared, those with the most shared tokens.
        samples: at most so many shared tokens of each pair.
        projection_ED: V of ``published``; None: ``batch_mean``.
    """
    published = projection_ED is not None
    first_P, second_P, token_PM, valid_PM, place_TE = _shared_tokens(
        routing, context, shared, published, pairs, samples
    )
    first_PMD = rows_ND[place_TE[token_PM, first_P[:, None]]]
    second_PMD = rows_ND[place_TE[token_PM, second_P[:, None]]]
    if projection_ED is not None:
        first_PMD, second_PMD = linear(first_PMD, projection_ED), linear(second_PMD, projection_ED)

    def similarity(first_MD: Tensor, second_MD: Tensor, valid_M: Tensor) -> Tensor:
        return alignment(*(rbf_kernel(value, sigma, valid_M, absolute=published) for value in (first_MD, second_MD)))

    cka_P = torch.vmap(similarity)(first_PMD, second_PMD, valid_PM)  # a row that is left out is zero in its kernel
    compared_P = valid_PM.sum(1) > 0
    alike_P = compared_P & (cka_P.detach() >= threshold)
    loss = (cka_P * alike_P).sum()
    if not published:
        loss = loss / alike_P.sum().clamp(min=1)
    compared = compared_P.sum().clamp(min=1)
    return loss, {
        "compared_pairs": compared_P.sum().to(cka_P.dtype),
        "pair_cka": (cka_P.detach() * compared_P).sum() / compared,
        "similar_pairs": alike_P.sum() / compared,
    }


@torch.no_grad()
def _shared_tokens(
    routing: Routing, context: RoutingContext, shared: float, published: bool, pairs: int, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The compared pairs' experts [P], [P], their sampled tokens [P, M], which of these count, and assignments [T, E].

    A pair that is not due, or has too few shared tokens, has none that count.
    """
    tokens, experts, device = routing.num_tokens, len(routing.counts_E), routing.expert_N.device
    place_TE = torch.zeros(tokens, experts, dtype=torch.int64, device=device)
    place_TE[routing.token_N, routing.expert_N] = torch.arange(len(routing.token_N), device=device)
    member_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=device)
    member_TE[routing.token_N, routing.expert_N] = True
    if context.mask_T is not None:
        member_TE &= context.mask_T[:, None]
    number_TE = member_TE.float()  # whole numbers below 2^24, exact
    row, column = torch.triu_indices(experts, experts, 1, device=device)
    count_P = (number_TE.T @ number_TE)[row, column]
    if published:
        draw_P = torch.rand(count_P.shape, generator=context.generator(device, "due pairs"), device=device)
        real = tokens if context.mask_T is None else context.mask_T.sum()
        due_P = (draw_P * shared * real < count_P) & (count_P > LEAST_SHARED)
    else:
        due_P = count_P > shared
    count_P, chosen_P = (count_P * due_P).topk(min(pairs, len(row)))
    first_P, second_P = row[chosen_P], column[chosen_P]
    both_PT = (member_TE[:, first_P] & member_TE[:, second_P]).T
    key_PT = torch.rand(both_PT.shape, generator=context.generator(device, "shared tokens"), device=device)
    key_PM, token_PM = key_PT.masked_fill(~both_PT, -1.0).topk(min(samples, tokens), dim=1)
    valid_PM = (key_PM >= 0) & (count_P > 0)[:, None]
    return first_P, second_P, token_PM, valid_PM, place_TE
