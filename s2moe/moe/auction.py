"""Assigning T tokens to E experts in equal shares, at the highest sum of scores: an auction on the device.

    max Σ_t s[t, a_t]   with every expert given ⌊T/E⌋ or ⌈T/E⌉ tokens

Bertsekas' auction in its form for alike objects (Bertsekas & Castañon 1989): an expert has C = ⌈T/E⌉ places at
one price p_i, the lowest bid among those who hold a place. All tokens without a place bid at once, each for its best
expert i at these prices, with j the second best:

    bid = p_i + (s_i − p_i) − (s_j − p_j) + ε

An expert keeps the C highest bids; who drops out bids again. Where E does not divide T, C E − T places stay empty, at
most one of an expert; these vacancies bid like tokens that score 0 everywhere, all of them at once for the
cheapest experts. Prices only rise, so a holder never regrets its place by more than ε, and when all are placed

    optimum − Σ_t s[t, a_t]  ≤  ε (T + vacancies + T / 64),    ε = epsilon · (widest range of one token's scores)

whatever the prices began with (T / 64 is for the grid of ``_to_grid``). They begin with those of the entropic problem
(moe/transport.py), which spares most of the bidding. If rounds run out, the tokens that are left over go where there
is room (``_complete``), so shares are equal in any case. Every answer comes with a certificate: for any prices p

    optimum  ≤  Σ_t max_i (s_ti − p_i) + max over allowed shares n of Σ_i n_i p_i

of which ``Assignment.gap`` is the distance to the sum attained, for each token.

Legend: T tokens, E experts, R = T + E bidders. ``mask_T`` is False for padding, which takes nobody's place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2moe.moe.rows import count
from s2moe.moe.transport import sinkhorn

CHECK_EVERY = 16  # rounds between two looks at whether all are placed, each of which waits for the device
GRID = 64  # steps of the scores' grid in one least step of a bid
START_ENTROPY, START_ITERATIONS = 0.02, 20  # of the entropic problem: ξ as a part of the scores' range


class Assignment(NamedTuple):
    """``gap`` and ``completed`` are float32 scalars."""

    expert_T: Tensor  # int64; padding has its best expert
    gap: Tensor  # at most so much more could the mean score of a token be
    completed: Tensor  # share of tokens that the auction left over: 0 but where rounds ran out
    rounds: int


class _Shares(NamedTuple):
    """Who gets how much, as scalars on the device: the number of tokens that are not padding is known only there."""

    tokens: Tensor
    places: Tensor  # C
    vacancies: Tensor  # C E − T


class _State(NamedTuple):
    expert_T: Tensor  # E for a token without a place
    bid_T: Tensor  # of those that have one
    vacant_E: Tensor  # bool, whether one of the expert's places is to stay empty
    vacancy_bid: Tensor  # scalar, the bid of every vacancy
    price_E: Tensor


@torch.no_grad()
def balanced_assignment(
    score_TE: Tensor, mask_T: Tensor | None = None, epsilon: float = 0.01, max_rounds: int = 512
) -> Assignment:
    """Each token's expert, in equal shares.

    Args:
        score_TE: in full precision. Scores that are no finite numbers count as 0: the shares stay equal.
        epsilon: smallest step of a bid, as a part of the widest range of one token's scores.
    """
    tokens, experts = score_TE.shape
    score_TE = torch.where(score_TE.isfinite(), score_TE, 0)
    greedy_T = score_TE.argmax(-1)
    if experts == 1 or tokens == 0:
        zero = score_TE.new_zeros((), dtype=torch.float32)
        return Assignment(greedy_T, zero, zero, 0)
    if mask_T is None:
        mask_T = torch.ones_like(greedy_T, dtype=torch.bool)
    score_TE = score_TE - score_TE.amax(-1, keepdim=True)  # changes every assignment's sum alike
    spread = -(score_TE * mask_T[:, None]).amin()
    spread = torch.where(spread > 0, spread, 1)
    real = mask_T.sum()
    places = (real + experts - 1) // experts
    shares = _Shares(real, places, places * experts - real)

    exact_TE, score_TE = score_TE, _to_grid(score_TE, spread * epsilon / GRID)
    start_price_E = _start_prices(score_TE, spread, mask_T)
    state = _State(
        expert_T=torch.full_like(greedy_T, experts),
        bid_T=torch.zeros_like(score_TE[:, 0]),
        vacant_E=torch.zeros_like(start_price_E, dtype=torch.bool),
        vacancy_bid=start_price_E.amin(),
        price_E=start_price_E,
    )
    done, rounds = False, 0
    while not done and rounds < max_rounds:
        for _ in range(min(CHECK_EVERY, max_rounds - rounds)):  # a round after all are placed changes nothing
            state = _round(state, score_TE, mask_T, shares, epsilon * spread, start_price_E)
            rounds += 1
        waiting = (_waiting(state, mask_T).sum() + shares.vacancies - state.vacant_E.sum()).item()
        done = waiting == 0
    left = _waiting(state, mask_T).sum() / real.clamp(min=1)
    expert_T = state.expert_T if done else _complete(state, score_TE, mask_T, shares)
    expert_T = torch.where(mask_T, expert_T, greedy_T)
    gap = _gap(expert_T, state.price_E, exact_TE, mask_T, shares)
    return Assignment(expert_T, gap.float(), left.float(), rounds)


def _to_grid(score_TE: Tensor, width: Tensor) -> Tensor:
    """Rounded to multiples of the power of two that lies at or below ``width``.

    Tokens with the same past, as the first ones of a sequence often are, have the same hidden state but for the
    rounding of matrix products, which depends on the parallel layout. On the grid they are equal, and the first
    one comes first.
    """
    grid = width.log2().floor().exp2()
    return (score_TE / grid).round() * grid


def _start_prices(score_TE: Tensor, spread: Tensor, mask_T: Tensor) -> Tensor:
    """Those at which experts are about equally sought after: minus the potential of the entropic problem, times ξ."""
    entropy = START_ENTROPY * spread
    return -entropy * sinkhorn(score_TE / entropy, START_ITERATIONS, mask_T)


def _waiting(state: _State, mask_T: Tensor) -> Tensor:
    return (state.expert_T == len(state.price_E)) & mask_T


def _round(
    state: _State, score_TE: Tensor, mask_T: Tensor, shares: _Shares, step: Tensor, start_price_E: Tensor
) -> _State:
    """All without a place bid, then every expert keeps its highest bids."""
    experts = len(state.price_E)
    waiting_T = _waiting(state, mask_T)
    net_T2, choice_T2 = (score_TE - state.price_E).topk(2, dim=-1)
    best_T = choice_T2[:, 0]
    expert_T = torch.where(waiting_T, best_T, state.expert_T)
    bid_T = torch.where(waiting_T, state.price_E[best_T] + net_T2[:, 0] - net_T2[:, 1] + step, state.bid_T)

    vacant_E, next_price = _with_all_vacancies(state, shares)
    is_missing = shares.vacancies > state.vacant_E.sum()
    # One bid for all of them: else a vacancy might hold a place dearer than one that another vacancy has lost.
    raised = torch.maximum(state.vacancy_bid, next_price + step)
    vacancy_bid = torch.where(is_missing, raised, state.vacancy_bid)

    numbers_E = torch.arange(experts, device=expert_T.device)
    expert_R = torch.cat((expert_T, numbers_E.masked_fill(~vacant_E, experts)))
    bid_R = torch.cat((bid_T, vacancy_bid.expand(experts)))
    kept_R = (_rank(expert_R, bid_R, experts) < shares.places) & (expert_R < experts)
    expert_R = expert_R.masked_fill(~kept_R, experts)

    lowest_E = bid_R.new_full((experts + 1,), torch.inf).scatter_reduce_(0, expert_R, bid_R, "amin")[:experts]
    held_E = count(expert_R, experts + 1)[:experts]
    full_E = (held_E >= shares.places) & (held_E > 0)
    return _State(
        expert_T=expert_R[: len(expert_T)],
        bid_T=bid_T,
        vacant_E=kept_R[len(expert_T) :],
        vacancy_bid=vacancy_bid,
        price_E=torch.where(full_E, lowest_E, start_price_E),
    )


def _with_all_vacancies(state: _State, shares: _Shares) -> tuple[Tensor, Tensor]:
    """Experts with a vacancy once the missing ones have taken the cheapest, and the price of the next cheapest."""
    missing = shares.vacancies - state.vacant_E.sum()
    price_E, order_E = state.price_E.masked_fill(state.vacant_E, torch.inf).sort(stable=True)
    taken_E = torch.empty_like(state.vacant_E).scatter_(
        0, order_E, torch.arange(len(order_E), device=order_E.device) < missing
    )
    return state.vacant_E | taken_E, price_E.gather(0, missing[None])[0]


def _rank(expert_R: Tensor, bid_R: Tensor, experts: int) -> Tensor:
    """Place of each bid among those for the same expert, from 0 for the highest; ties by position."""
    order_R = bid_R.argsort(descending=True, stable=True)
    order_R = order_R[expert_R[order_R].argsort(stable=True)]
    bids_E = count(expert_R, experts + 1)
    start_E = bids_E.cumsum(0) - bids_E
    place_R = torch.arange(len(order_R), device=order_R.device) - start_E[expert_R[order_R]]
    return torch.empty_like(place_R).scatter_(0, order_R, place_R)


def _complete(state: _State, score_TE: Tensor, mask_T: Tensor, shares: _Shares) -> Tensor:
    """Places for all, by the best scores after prices that find room. Keeps what the auction placed, where it can.

    In each pass every token without a place asks its best expert with room. Either all are placed, or an expert
    has become full: as many passes as experts suffice. The loop runs only where the auction ran out of rounds.
    """
    experts = len(state.price_E)
    vacant_E, _ = _with_all_vacancies(state, shares)
    capacity_E = shares.places - vacant_E.long()  # which add up to the number of tokens
    rank_T = _rank(state.expert_T, state.bid_T, experts)
    expert_T = state.expert_T.masked_fill(rank_T >= _none_beyond(capacity_E)[state.expert_T], experts)
    net_TE = score_TE - state.price_E
    for _ in range(experts):
        room_E = capacity_E - count(expert_T, experts + 1)[:experts]
        net_T, best_T = net_TE.masked_fill(room_E <= 0, -torch.inf).max(-1)
        asked_T = torch.where((expert_T == experts) & mask_T, best_T, experts)
        expert_T = torch.where(_rank(asked_T, net_T, experts) < _none_beyond(room_E)[asked_T], asked_T, expert_T)
    return expert_T


def _none_beyond(room_E: Tensor) -> Tensor:
    """With a last entry of 0, for expert number E, which stands for none."""
    return torch.cat((room_E, room_E.new_zeros(1)))


def _gap(expert_T: Tensor, price_E: Tensor, score_TE: Tensor, mask_T: Tensor, shares: _Shares) -> Tensor:
    """The certificate of the module's docstring for a token; 0 without any."""
    most_T = (score_TE - price_E).amax(-1)
    loss_T = most_T - score_TE.gather(-1, expert_T[:, None])[:, 0]
    experts = len(price_E)
    floor = shares.tokens // experts
    is_larger_E = torch.arange(experts, device=price_E.device) < shares.tokens - floor * experts  # the dearest ones
    given_E = floor + is_larger_E.long()
    bound = (loss_T * mask_T).sum() + (price_E.sort(descending=True).values * given_E).sum()
    return bound.clamp(min=0) / shares.tokens.clamp(min=1)
