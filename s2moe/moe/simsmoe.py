"""SimSMoE: experts that see the same tokens must not represent them alike.

Do et al. 2025, "SimSMoE: Toward Efficient Training Mixture of Experts via Solving Representational Collapse".
For a pair of experts i, j that share more than f* tokens of a micro-batch, with outputs Z_i, Z_j on the shared tokens,

    L_sim = mean over pairs with CKA(Z_i, Z_j) ≥ T* of CKA(Z_i, Z_j)

with the RBF kernel (objectives/cka.py), so that pairs that differ enough already are left alone. Of the E (E − 1) / 2
pairs those that share most are compared, on a sample of their tokens: all of them would cost a kernel of
shared tokens squared each. Needs tokens with two experts or more.

Legend: T tokens, D model, E experts, N assignments, P pairs, M sampled tokens of a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2moe.moe.routing import Routing, RoutingContext
from s2moe.objectives.cka import alignment, rbf_kernel


def pair_similarity_loss(
    rows_ND: Tensor,
    routing: Routing,
    context: RoutingContext,
    sigma: float,
    threshold: float,
    shared: int,
    pairs: int,
    samples: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_sim (0 where no pair counts), and figures for the log: mean CKA of the compared pairs, pairs above T*.

    Args:
        rows_ND: each assignment's expert output, without its weight, in the order of the routing's list.
        sigma: of the RBF kernel, as a multiple of the median distance.
        threshold: T*.
        shared: f*: pairs that share no more tokens than this do not count.
        pairs: at most so many pairs are compared, those with the most shared tokens.
        samples: at most so many shared tokens of each pair.
    """
    first_P, second_P, token_PM, valid_PM, place_TE = _shared_tokens(routing, context, shared, pairs, samples)
    first_PMD = rows_ND[place_TE[token_PM, first_P[:, None]]]
    second_PMD = rows_ND[place_TE[token_PM, second_P[:, None]]]
    # One kernel a pair, batched; a row that is left out is zero in its kernel.
    cka_P = torch.vmap(
        lambda first, second, valid: alignment(rbf_kernel(first, sigma, valid), rbf_kernel(second, sigma, valid))
    )(first_PMD, second_PMD, valid_PM)
    compared_P = valid_PM.sum(1) > 0
    alike_P = compared_P & (cka_P.detach() >= threshold)
    loss = (cka_P * alike_P).sum() / alike_P.sum().clamp(min=1)
    return loss, {
        "pair_cka": (cka_P.detach() * compared_P).sum() / compared_P.sum().clamp(min=1),
        "similar_pairs": alike_P.sum() / compared_P.sum().clamp(min=1),
    }


@torch.no_grad()
def _shared_tokens(
    routing: Routing, context: RoutingContext, shared: int, pairs: int, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The compared pairs' experts [P], [P], their sampled tokens [P, M], which of these count, and assignments [T, E].

    A pair with too few shared tokens has none that count.
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
    count_P, chosen_P = count_P.topk(min(pairs, len(row)))
    first_P, second_P = row[chosen_P], column[chosen_P]
    both_PT = (member_TE[:, first_P] & member_TE[:, second_P]).T
    key_PT = torch.rand(both_PT.shape, generator=context.generator(device, "shared tokens"), device=device)
    key_PM, token_PM = key_PT.masked_fill(~both_PT, -1.0).topk(min(samples, tokens), dim=1)
    valid_PM = (key_PM >= 0) & (count_P > shared)[:, None]
    return first_P, second_P, token_PM, valid_PM, place_TE
