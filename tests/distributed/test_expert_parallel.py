"""The parallel layout must not change training: expert parallel 2 equals 1, at every ZeRO stage."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import jobs
from tests.distributed_harness import run_distributed

pytestmark = pytest.mark.distributed

SHAPES = [(1, 1), (2, 1), (2, 2), (2, 3)]
STEPS = 4


def merged(results: list[dict], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The ranks' parameters as one process would hold them: blocks of experts one after another."""
    states = [result[shape]["state"] for result in results]
    whole = {}
    for name, parameter in states[0].items():
        is_spread = ".experts." in name and shape[0] > 1
        whole[name] = torch.cat([state[name] for state in states]) if is_spread else parameter
    return whole


@pytest.mark.parametrize(
    "moe",
    [
        {"method": "s2moe", "router": {"bias_update_rate": 0.01}},
        {"method": "smoe", "shared_experts": 1, "router": {"capacity_factor": 1.0, "z_loss": 0.001}},
        {"method": "smoe", "expert_form": "mlp", "activation": "relu", "router": {"combine": "sigmoid"}},
    ],
    ids=["s2moe", "capacity and shared", "mlp and sigmoid"],
)
def test_training_does_not_depend_on_the_layout(moe: dict) -> None:
    results = run_distributed(jobs.train_shapes, 2, SHAPES, STEPS, moe)
    reference = results[0][SHAPES[0]]
    reference_state = merged(results, SHAPES[0])
    torch.manual_seed(0)
    initial = jobs.S2MoEForCausalLM(jobs.tiny_config(**moe)).state_dict()
    assert any((reference_state[name] - initial[name]).abs().max() > 1e-3 for name in reference_state)
    for shape in SHAPES[1:]:
        for rank, result in enumerate(results):
            run = result[shape]
            assert run["expert_rank"] == rank
            assert run["losses"] == pytest.approx(reference["losses"], rel=2e-5), shape
            assert run["norms"] == pytest.approx(reference["norms"], rel=2e-4), shape
            for name, buffer in run["buffers"].items():
                torch.testing.assert_close(buffer, reference["buffers"][name], msg=lambda m, n=name: f"{n}: {m}")
        for name, parameter in merged(results, shape).items():
            torch.testing.assert_close(
                parameter, reference_state[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name, s=shape: f"{s} {n}: {m}"
            )


@pytest.mark.parametrize("assignment", ["routed", "one_rank", "empty_rank", "ragged"])
@pytest.mark.parametrize("world", [2, 4])
def test_layer_over_ranks_equals_layer_in_one_process(world: int, assignment: str) -> None:
    results = run_distributed(jobs.layer_against_single_process, world, {}, assignment)
    assert max(result["size"] for result in results) > 1e-3
    for result in results:
        for what in ("output", "input_gradient", "weight_gradient"):
            assert result[what] < 1e-12, (what, result)


def test_a_rank_builds_only_its_own_experts() -> None:
    whole = 8 * 3 * 8 * 16
    assert run_distributed(jobs.local_parameters, 2, 2, 8) == [whole // 2] * 2
    assert run_distributed(jobs.local_parameters, 2, 1, 8) == [whole] * 2


def test_a_degree_that_does_not_divide_is_refused() -> None:
    assert (
        run_distributed(jobs.refused_degree, 2, 3)
        == ["expert-parallel degree 3 does not divide the 2 processes: choose one of [1, 2]"] * 2
    )


def test_four_ranks_with_two_copies_of_the_experts() -> None:
    """World 4: every degree, and experts that are data-parallel as well (degree 2)."""
    shapes = [(1, 1), (2, 1), (4, 1), (2, 3)]
    moe = {"method": "smoe", "router": {"z_loss": 0.001, "bias_update_rate": 0.01}}
    results = run_distributed(jobs.train_shapes, 4, shapes, 3, moe)
    reference = results[0][shapes[0]]
    for shape in shapes[1:]:
        for result in results:
            assert result[shape]["losses"] == pytest.approx(reference["losses"], rel=2e-5), shape
            assert result[shape]["norms"] == pytest.approx(reference["norms"], rel=2e-4), shape


@pytest.mark.slow
def test_half_precision_does_not_depend_on_the_layout() -> None:
    """bf16 runs through other classes of DeepSpeed. Rounding differs by layout, the training does not."""
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    moe = {"method": "smoe", "router": {"balance_scope": "global"}}
    results = run_distributed(jobs.train_shapes, 2, SHAPES, 3, moe, half)
    reference = results[0][SHAPES[0]]
    for shape in SHAPES[1:]:
        assert results[0][shape]["losses"] == pytest.approx(reference["losses"], rel=2e-3), shape
        assert results[0][shape]["norms"] == pytest.approx(reference["norms"], rel=3e-2), shape
