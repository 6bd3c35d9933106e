"""Running thresholds: what they average, when they move, and that a forward pass never moves them.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEForCausalLM
from s2moe.moe.contest import Contest, best_of_token
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routing import RoutingContext
from s2moe.moe.thresholds import RunningThresholds
from tests.models.decoder import tiny

E, DECAY = 4, 0.8
METHODS = ("usmoe", "expert_choice")


def thresholds(budget: float = 2, contests: int = 1, experts: int = E) -> RunningThresholds:
    return RunningThresholds(experts, budget, contests, DECAY).double()


def contest(score_TE: Tensor, per_expert: bool = False, scope: str = "token_batch", **context: Any) -> Contest:
    return Contest(score_TE, scope, RoutingContext(**context), per_expert)


def threshold(made: RunningThresholds, budget: float) -> list[float]:
    """Read off by asking which scores pass, to 1e-4: one number for each contest."""
    grid_T = torch.arange(0, 1, 1e-4, dtype=torch.float64)
    nothing_TE = torch.zeros(len(grid_T), made.num_experts, dtype=torch.bool)
    passed_TE = made.passing(grid_T[:, None].expand(-1, made.num_experts), budget, nothing_TE)
    values = [grid_T[column].min().item() for column in passed_TE.T]
    return values if made.contests > 1 else values[:1]


@pytest.mark.parametrize(
    ("experts", "budget", "want"),
    [(4, 2, [1, 2]), (16, 2, [1, 2, 4, 8]), (4, 1.5, [1, 1.5, 2]), (6, 3, [1, 2, 3, 4]), (4, 4, [1, 2]), (1, 1, [])],
)
def test_budgets_are_powers_of_two_and_the_trained_one(experts: int, budget: float, want: list[float]) -> None:
    assert thresholds(budget, experts=experts).budgets == want


@pytest.mark.parametrize(("budget", "place"), [(1, 5), (1.5, 8), (2, 10)])  # 5 tokens: 1.5 · 5 = 7.5, rounded up
def test_cutoff_is_the_score_of_the_last_winner(budget: float, place: int) -> None:
    score_TE = torch.rand(5, E, dtype=torch.float64)
    made = thresholds(budget)
    made.update(made.feedback(contest(score_TE)))
    want = sorted(score_TE.flatten().tolist(), reverse=True)[place - 1]
    assert threshold(made, budget) == pytest.approx([want], abs=1e-4)
    assert contest(score_TE).winners(budget).sum().item() == place


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_every_expert_has_its_own_cutoff(budget: int) -> None:
    score_TE = torch.rand(6, E, dtype=torch.float64)
    made = thresholds(budget, contests=E)
    made.update(made.feedback(contest(score_TE, per_expert=True)))
    place = {1: 2, 2: 3, 3: 5}[budget]  # 6 · budget / 4, rounded up
    want = [sorted(score_TE[:, e].tolist(), reverse=True)[place - 1] for e in range(E)]
    assert threshold(made, budget) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_average_is_that_of_adam(steps: int) -> None:
    """Σ_i (1 - d) d^(n - i) m_i / (1 - d^n): after one step it is that step's own value."""
    made, means = thresholds(), []
    for _ in range(steps):
        score_TE = torch.rand(5, E, dtype=torch.float64)
        means.append(sorted(score_TE.flatten().tolist(), reverse=True)[9])
        made.update(made.feedback(contest(score_TE)))
    weights = [(1 - DECAY) * DECAY ** (steps - 1 - i) for i in range(steps)]
    want = sum(w * m for w, m in zip(weights, means, strict=True)) / (1 - DECAY**steps)
    assert threshold(made, 2) == pytest.approx([want], abs=1e-4)


def test_ranks_and_micro_batches_weigh_by_their_tokens() -> None:
    """Feedback is summed: unequal micro-batches, sequences of unequal length, and a rank of padding alone."""
    first_TE, second_TE, empty_TE = (torch.rand(t, E, dtype=torch.float64) for t in (3, 8, 2))
    mask_T = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0], dtype=torch.bool)  # two sequences, with 3 and 1 real tokens
    made = thresholds()
    made.update(
        made.feedback(contest(first_TE))
        + made.feedback(contest(second_TE, scope="sequence", sequences=2, mask_T=mask_T))
        + made.feedback(contest(empty_TE, mask_T=torch.zeros(2, dtype=torch.bool)))
    )

    def cutoff(rows_TE: Tensor) -> float:
        return sorted(rows_TE.flatten().tolist(), reverse=True)[2 * len(rows_TE) - 1]

    want = (3 * cutoff(first_TE) + 3 * cutoff(second_TE[:3]) + cutoff(second_TE[6:7])) / 7
    assert threshold(made, 2) == pytest.approx([want], abs=1e-4)


def test_a_step_without_tokens_teaches_nothing() -> None:
    made, empty = thresholds(), torch.zeros(2, dtype=torch.bool)
    nothing = made.feedback(contest(torch.rand(2, E, dtype=torch.float64), mask_T=empty))
    made.update(nothing)
    assert not made.weight.any()
    made.update(made.feedback(contest(torch.rand(5, E, dtype=torch.float64))))
    before = threshold(made, 2)
    made.update(nothing)
    assert threshold(made, 2) == before


def test_before_the_first_step_the_answer_is_the_given_one() -> None:
    score_TE, given_TE = torch.rand(5, E), torch.rand(5, E) > 0.5
    made = RunningThresholds(E, 2, 1, DECAY)
    assert torch.equal(made.passing(score_TE, 2, given_TE), given_TE)
    made.update(made.feedback(contest(score_TE)))
    assert torch.equal(made.passing(score_TE + 1e-6, 2, given_TE), contest(score_TE).winners(2))
    assert made.passing(score_TE, E, given_TE).all()
    made.reset_parameters()
    assert torch.equal(made.passing(score_TE, 2, given_TE), given_TE)


def test_other_budgets_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"3 experts per token: choose one of 1, 1\.5, 2, 4, or set .*inference=topk"):
        thresholds(1.5).passing(torch.rand(5, E), 3, torch.zeros(5, E, dtype=torch.bool))


@pytest.mark.parametrize("per_expert", [False, True])
def test_ties_go_to_the_earlier_token_and_winners_stay_exact(per_expert: bool) -> None:
    score_TE = torch.full((6, E), 0.25)
    won_TE = contest(score_TE, per_expert).winners(1)
    assert won_TE.sum().item() == (8 if per_expert else 6)
    want_TE = torch.zeros(6, E, dtype=torch.bool)
    if per_expert:
        want_TE[:2] = True
    else:
        want_TE.view(-1)[:6] = True
    assert torch.equal(won_TE, want_TE)


@pytest.mark.parametrize("per_expert", [False, True])
def test_padding_never_wins_whatever_its_score(per_expert: bool) -> None:
    """Nor where all real scores are negative."""
    score_TE, mask_T = -torch.rand(6, E) - 1, torch.tensor([0, 1, 1, 0, 1, 1], dtype=torch.bool)
    score_TE[~mask_T] = 5.0
    made = contest(score_TE, per_expert, mask_T=mask_T)
    assert torch.equal(made.winners(E), mask_T[:, None].expand(6, E))
    won_TE = made.winners(1)
    assert won_TE.sum().item() == 4
    assert not won_TE[~mask_T].any()
    assert (made.cutoffs([1, E]) < 0).all()


@pytest.mark.parametrize("most", [1, 2, E])
def test_best_of_a_token(most: int) -> None:
    score_TE, among_TE = torch.rand(20, E), torch.rand(20, E) > 0.4
    for row, allowed, got, plain in zip(
        score_TE, among_TE, best_of_token(score_TE, most, among_TE), best_of_token(score_TE, most), strict=True
    ):
        ranked = sorted(range(E), key=lambda e, row=row: -row[e].item())
        inside = [e for e in ranked if allowed[e]]
        assert got.nonzero().flatten().tolist() == sorted(inside[:most])
        assert plain.nonzero().flatten().tolist() == sorted(ranked[:most])


def buffers(model: S2MoEForCausalLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "thresholds" in name}


@pytest.mark.parametrize("method", METHODS)
def test_state_is_saved_in_float32_and_is_no_parameter(method: str) -> None:
    model = tiny(method).bfloat16()
    saved = {name: value for name, value in model.state_dict().items() if "thresholds" in name}
    assert len(saved) == 2 * model.config.num_hidden_layers
    assert all(value.dtype == torch.float32 and value.dim() == 1 for value in saved.values())
    assert not [name for name, _ in model.named_parameters() if "thresholds" in name]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_forward_pass_moves_the_thresholds(method: str, train: bool) -> None:
    model, ids = tiny(method).train(train), torch.randint(19, (2, 6))
    model.update_routers([tiny(method)(ids).routing])
    before = buffers(model)
    assert all(value.all() for value in before.values())
    out = model(ids, labels=ids)
    for name, value in buffers(model).items():
        assert torch.equal(value, before[name]), name
    assert all((layer.feedback is not None) == train for layer in out.routing)


@pytest.mark.parametrize("method", METHODS)
def test_activation_recomputation_counts_once(method: str) -> None:
    ids, results = torch.randint(19, (2, 6)), []
    plain, checkpointed = tiny(method), tiny(method)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        out = model(ids, labels=ids, context=RoutingContext())
        out.loss.backward()
        model.update_routers([out.routing])
        results.append(buffers(model))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reroute", [True, False])
def test_the_noisy_pass_of_s2moe_moves_no_threshold(method: str, reroute: bool) -> None:
    """The thresholds are those of the clean tokens, which alone there are at inference."""
    model = tiny("s2moe_k2", {"name": method}, num_hidden_layers=1, moe_stochastic={"reroute": reroute})
    seen = []
    model.model.layers[0].moe.router.register_forward_hook(lambda module, given, out: seen.append((given[1], out)))
    out = model(torch.randint(19, (2, 6)), context=RoutingContext())
    assert [context.copy for context, _ in seen] == ([0, 1] if reroute else [0])
    assert [routing.feedback is not None for _, routing in seen] == ([True, False] if reroute else [True])
    model.update_routers([out.routing])
    made = model.model.layers[0].moe.router.thresholds
    clean = seen[0][1].feedback
    torch.testing.assert_close(made.sum_N / made.weight, (clean[:-1] / clean[-1]).float())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 1.5, 2])
def test_inference_meets_the_budget_on_average(method: str, budget: float) -> None:
    """On tokens of the distribution it was trained on; each expert its share, where the experts choose."""
    cls = ROUTERS[method]
    made = cls(8, 8, 2, cls.Options(budget=budget))
    torch.nn.init.normal_(made.scores.weight)
    for _ in range(10):
        made.after_step(made(torch.randn(1024, 8), RoutingContext(sequences=8)).feedback)
    told = made(torch.randn(4096, 8), RoutingContext()).stats["inference_experts_per_token"].item()
    made.eval()
    routing = made(torch.randn(4096, 8), RoutingContext())
    assert told == pytest.approx(budget, rel=0.06)
    assert routing.stats["experts_per_token"].item() == pytest.approx(budget, rel=0.06)
    if method == "expert_choice":
        assert routing.counts_E.tolist() == pytest.approx([4096 * budget / 8] * 8, rel=0.15)
    fewer = made(torch.randn(4096, 8), RoutingContext(experts_per_token=4))
    assert fewer.stats["experts_per_token"].item() == pytest.approx(4, rel=0.06)
