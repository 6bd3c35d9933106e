"""Limited capacity against buffers filled one assignment at a time.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math

import pytest
import torch

from s2moe.moe.capacity import keep_within_capacity
from s2moe.moe.config import resolve_moe
from s2moe.moe.layer import build_layer
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routing import RoutingContext
from tests.moe import reference

T, E = 13, 4


def random_choices(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits_TE = torch.randn(T, E) + torch.tensor([2.0, 1.0, 0.0, 0.0])  # a favourite, so that something drops
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(k)
    return expert_TK, weight_TK


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("capacity", [1, 3, 6, 100])
def test_kept_assignments_equal_the_simulation(policy: str, k: int, capacity: int) -> None:
    for _ in range(5):
        expert_TK, weight_TK = random_choices(k)
        keep_TK = keep_within_capacity(expert_TK, weight_TK, E, capacity, policy)
        want = reference.kept_within_capacity(expert_TK.tolist(), weight_TK.tolist(), capacity, policy)
        assert {tuple(pair) for pair in keep_TK.nonzero().tolist()} == want
        for e in range(E):
            asked = int((expert_TK == e).sum())
            assert int((keep_TK & (expert_TK == e)).sum()) == min(asked, capacity)


def test_equal_weights_are_dropped_by_position() -> None:
    expert_TK = torch.zeros(5, 1, dtype=torch.int64)
    keep_TK = keep_within_capacity(expert_TK, torch.ones(5, 1), E, 2, "probability")
    assert keep_TK[:, 0].tolist() == [True, True, False, False, False]


def router(policy: str, factor: float, k: int = 2) -> torch.nn.Module:
    cls = ROUTERS["topk"]
    made = cls(8, E, k, cls.Options(capacity_factor=factor, drop_policy=policy)).double()
    torch.nn.init.normal_(made.scores.weight)
    return made


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_router_drops_in_training_and_never_in_evaluation(policy: str, factor: float) -> None:
    made, hidden_TD = router(policy, factor), torch.randn(T, 8, dtype=torch.float64) + 0.5
    choices = [reference.choose(made.scores.weight @ x, 2) for x in hidden_TD]
    kept = reference.kept_within_capacity(
        [[e for e, _ in chosen] for chosen in choices],
        [[w.item() for _, w in chosen] for chosen in choices],
        math.ceil(factor * 2 * T / E),
        policy,
    )
    routing = made(hidden_TD, RoutingContext())
    want = [(t, e, w.item()) for t, chosen in enumerate(choices) for k, (e, w) in enumerate(chosen) if (t, k) in kept]
    assert routing.token_N.tolist() == [t for t, _, _ in want]
    assert routing.expert_N.tolist() == [e for _, e, _ in want]
    assert routing.weight_N.tolist() == pytest.approx([w for _, _, w in want])
    assert routing.counts_E.tolist() == [sum(e == i for _, e, _ in want) for i in range(E)]
    assert routing.stats["dropped_fraction"].item() == pytest.approx(1 - len(kept) / (2 * T))
    # The load that is balanced is the one the router asked for, not what fitted (Switch, eq. 5).
    logits_TE = torch.stack([made.scores.weight @ x for x in hidden_TD])
    wanted = reference.balance(logits_TE, choices, "switch")
    torch.testing.assert_close(routing.stats["balance_loss"], wanted.detach())

    assert len(made.eval()(hidden_TD, RoutingContext()).token_N) == 2 * T


@pytest.mark.parametrize("factor", [1.1, 1.2, 1.25, 0.7])
def test_capacity_is_the_ceiling_of_the_exact_product(factor: float) -> None:
    """1.1 · 1 · 100 / 10 is 11, though 1.1 * 100 / 10 > 11 in floating point."""
    cls = ROUTERS["topk"]
    made = cls(4, 10, 1, cls.Options(capacity_factor=factor))
    with torch.no_grad():
        made.scores.weight.zero_()
        made.scores.weight[3, 0] = 1.0  # every token wants expert 3
    routing = made(torch.ones(100, 4), RoutingContext())
    exact = -(-round(factor * 100) * 10 // 100)
    assert routing.counts_E.tolist() == [exact if e == 3 else 0 for e in range(10)]


def test_a_token_dropped_by_all_its_experts_gets_nothing_and_its_router_no_gradient() -> None:
    config = resolve_moe(
        {
            "method": "smoe",
            "num_experts": 2,
            "experts_per_token": 1,
            "expert_hidden": 5,
            "router": {"capacity_factor": 0.5, "balance_loss": 0.0},
        }
    )
    layer = build_layer(config, 6, 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        layer.router.scores.weight.zero_()
        layer.router.scores.weight[1, 0] = 1.0
    hidden_BSD = torch.randn(1, 8, 6, dtype=torch.float64)
    hidden_BSD[..., 0] = 2.0  # everyone wants expert 1, which has room for ceil(0.5 * 8 / 2) = 2
    hidden_BSD.requires_grad_()
    out_BSD, statistics = layer(hidden_BSD)
    assert statistics.counts_E.tolist() == [0, 8]  # what was asked for
    assert statistics.values["dropped_fraction"].item() == 6 / 8
    assert out_BSD[0, :2].abs().sum(-1).min() > 0
    assert not out_BSD[0, 2:].any()
    out_BSD.square().sum().backward()
    assert not hidden_BSD.grad[0, 2:].any()


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_padding_never_takes_a_real_tokens_place(policy: str) -> None:
    """Left padding comes first in position; what it asks for must not fill an expert's buffer."""
    made = router(policy, 1.0)
    hidden_TD = torch.randn(T, 8, dtype=torch.float64) + 0.5
    mask_T = torch.arange(T) >= 5
    kept = []
    for filler in (0.3, -3.0):  # what stands in the padding decides which experts it asks for
        hidden_TD[:5] = filler
        routing = made(hidden_TD, RoutingContext(mask_T=mask_T))
        real_N = mask_T[routing.token_N]
        kept.append((routing.token_N[real_N].tolist(), routing.expert_N[real_N].tolist()))
    assert kept[0] == kept[1]
