"""V-MoE whose experts two ranks share trains as in one process without DeepSpeed, at ZeRO 1 and 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import vmoe_jobs
from tests.distributed.test_expert_parallel import merged
from tests.distributed_harness import run_distributed
from tests.ties import on_clear_data

pytestmark = pytest.mark.distributed

SHAPES = [(1, 1), (2, 1), (2, 3)]  # expert-parallel degree, ZeRO stage
STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "bpr and dropout": {
        "dropout": 0.1,
        "moe": {
            "expert_dropout": 0.2,
            "router": {"priority": "max", "capacity_factor": 0.8, "group_size": 2, "importance_loss": 0.5},
        },
    },
    # One process, taking micro-batches one by one, balances each by itself.
    "s2moe with momentum": {
        "moe": {"method": "s2moe", "momentum": {"kind": "heavy_ball"}, "router": {"balance_scope": "local"}},
    },
}


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_training_is_that_of_one_process(given: dict[str, Any]) -> None:
    data, wanted = on_clear_data(lambda seed: vmoe_jobs.one_process(STEPS, given, 2, seed))
    results = run_distributed(vmoe_jobs.train_shapes, 2, SHAPES, STEPS, given, data)
    initial = vmoe_jobs.whole_initial_state(given)
    assert any((wanted["state"][name] - initial[name]).abs().max() > 1e-3 for name in initial if ".experts." in name)
    if "capacity_factor" in given["moe"]["router"]:
        assert max(results[0][SHAPES[0]]["dropped"]) > 0.1
    for shape in SHAPES:
        for result in results:
            assert result[shape]["losses"] == pytest.approx(wanted["losses"], rel=2e-5), shape
            assert result[shape]["norms"] == pytest.approx(wanted["norms"], rel=2e-4), shape
        state = merged(results, shape)
        assert state.keys() == wanted["state"].keys()
        for name, parameter in state.items():
            torch.testing.assert_close(
                parameter, wanted["state"][name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name, s=shape: f"{s} {n}: {m}"
            )
