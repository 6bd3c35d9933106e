"""Competitions of experts on several ranks: the layout changes nothing, and rows come back to their places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from s2moe.moe.assignments import all_pairs
from s2moe.moe.competition import competing_layers
from s2moe.moe.config import resolve_moe
from s2moe.moe.dispatch import expert_outputs
from s2moe.moe.layer import build_layer
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import ExpertParallel
from tests.distributed import jobs
from tests.distributed.test_expert_parallel import merged
from tests.distributed_harness import run_distributed

pytestmark = pytest.mark.distributed

SHAPES = [(1, 1), (2, 1), (2, 2), (2, 3)]  # expert-parallel degree, ZeRO stage
STEPS = 4
COEFFICIENTS = {"distillation_loss": 3.0, "diversity_loss": 0.7, "affinity_balance_loss": 0.4}


@pytest.mark.parametrize(
    ("competition", "router"),
    [
        ({"rate": 1.0, **COEFFICIENTS}, {"bias_update_rate": 0.01}),
        # Steps with and without, in one layer at a time, and a router that learns nothing where it does compete.
        ({"rate": 0.8, "max_layers": 1, **COEFFICIENTS, "distillation_loss": 0.0}, {"noise": "shazeer"}),
    ],
    ids=["always", "now and then"],
)
def test_training_does_not_depend_on_the_layout(competition: dict[str, Any], router: dict[str, Any]) -> None:
    moe = {"method": "compete_smoe", "competition": competition, "router": router}
    plan = [competing_layers(resolve_moe(moe), RoutingContext(step=step, layers=2)) for step in range(STEPS)]
    assert plan == [{0, 1}] * STEPS or {0} in plan, plan
    results = run_distributed(jobs.train_shapes, 2, SHAPES, STEPS, moe)
    reference = results[0][SHAPES[0]]
    reference_state = merged(results, SHAPES[0])
    for shape in SHAPES[1:]:
        for result in results:
            run = result[shape]
            assert run["losses"] == pytest.approx(reference["losses"], rel=2e-5), shape
            assert run["norms"] == pytest.approx(reference["norms"], rel=2e-4), shape
            for name, buffer in run["buffers"].items():
                torch.testing.assert_close(buffer, reference["buffers"][name], msg=lambda m, n=name: f"{n}: {m}")
        for name, parameter in merged(results, shape).items():
            torch.testing.assert_close(
                parameter, reference_state[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name, s=shape: f"{s} {n}: {m}"
            )


def rows_against_single_process(kind: str) -> dict[str, float]:
    """Largest differences between ``expert_outputs`` of experts spread over all ranks and of all on this rank.

    Args:
        kind: "all": every expert for every token; otherwise one of ``jobs.forced_routing``.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    config, tokens = resolve_moe({"method": "smoe", "num_experts": 4, "expert_hidden": 16}), 5 + rank
    generator = torch.Generator().manual_seed(10 + rank)
    inputs = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    results = []
    for parallel in (ExpertParallel(), ExpertParallel(world, rank, dist.group.WORLD)):
        torch.manual_seed(0)
        layer = build_layer(config, 8, 0, parallel).double()
        layer.experts.reset_parameters(0.5)
        hidden = inputs.clone().requires_grad_()
        routing = all_pairs(tokens, 4, hidden.device) if kind == "all" else jobs.forced_routing(kind, tokens, rank)
        rows = expert_outputs(hidden, routing, layer.experts, parallel)
        factor = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view_as(rows)
        (rows * factor).sum().backward()
        results.append((rows.detach(), hidden.grad, [w.grad for w in layer.experts.parameters()]))
    (whole, whole_input, whole_weights), (spread, spread_input, spread_weights) = results
    own, weights = layer.experts.local_experts, 0.0
    for ours, theirs in zip(spread_weights, whole_weights, strict=True):
        dist.all_reduce(theirs)
        weights = max(weights, (ours - theirs[own.start : own.stop]).abs().max().item())
    return {
        "rows": (whole - spread).abs().sum().item(),
        "input_gradient": (whole_input - spread_input).abs().max().item(),
        "weight_gradient": weights,
        "size": whole.abs().sum().item(),
    }


@pytest.mark.parametrize("kind", ["all", "one_rank", "empty_rank", "ragged"])
def test_rows_of_experts_on_other_ranks_come_back_to_their_places(kind: str) -> None:
    results = run_distributed(rows_against_single_process, 2, kind)
    assert max(result["size"] for result in results) > 1e-3
    for result in results:
        for what in ("rows", "input_gradient", "weight_gradient"):
            assert result[what] < 1e-12, (what, result)
