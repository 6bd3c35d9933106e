"""Every published method under DeepSpeed: the parallel layout changes nothing, and resuming changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import jobs
from tests.distributed.test_expert_parallel import merged
from tests.distributed_harness import run_distributed
from tests.methods.cases import CASES, S2MOE_CASES
from tests.run_logs import reproducible_events
from tests.training.jobs import tiny_run

pytestmark = pytest.mark.distributed

SHAPES = [(1, 1), (2, 1), (2, 2), (2, 3)]  # expert-parallel degree, ZeRO stage
STEPS = 4


@pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
def test_training_does_not_depend_on_the_layout(moe: dict[str, Any]) -> None:
    assert_same_training(moe)


@pytest.mark.slow
@pytest.mark.parametrize("moe", S2MOE_CASES.values(), ids=S2MOE_CASES)
def test_training_with_s2moe_does_not_depend_on_the_layout(moe: dict[str, Any]) -> None:
    assert_same_training(moe)


def assert_same_training(moe: dict[str, Any]) -> None:
    """Losses, gradient norms, buffers and final weights are those of one process' layout."""
    results = run_distributed(jobs.train_shapes, 2, SHAPES, STEPS, moe)
    reference = results[0][SHAPES[0]]
    reference_state = merged(results, SHAPES[0])
    torch.manual_seed(0)
    initial = jobs.S2MoEForCausalLM(jobs.tiny_config(**moe)).state_dict()
    assert any((reference_state[name] - initial[name]).abs().max() > 1e-3 for name in reference_state)
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


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def overrides_of(moe: dict[str, Any], prefix: str = "model.moe") -> list[str]:
    """The nested settings as ``section.key=value`` arguments."""
    found = []
    for key, value in moe.items():
        path = f"{prefix}.{key}"
        found += overrides_of(value, path) if isinstance(value, dict) else [f"{path}={value}"]
    return found


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
def test_resumed_equals_uninterrupted(moe: dict[str, Any], stage: int, directory: Path) -> None:
    """Bit for bit, on two ranks that share the experts, from a checkpoint in the middle: after step 3 of 6."""
    path, common = tiny_run(directory)
    name = f"{moe['method']}-{stage}"
    settings = [
        *common,
        *overrides_of(moe),
        f"name={name}",
        f"training.zero_stage={stage}",
        "training.expert_parallel=2",
        "checkpoint.every=3",
        "logging.tensorboard=false",
        "logging.sample_tokens=0",
    ]
    assert run_distributed("tests.training.jobs:train", 2, path, settings)[0]["finished"]
    run = directory / "runs" / name
    log, weights = reproducible_events(run), load_file(run / "hf" / "model.safetensors")
    shutil.rmtree(run / "hf")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    settings.append("checkpoint.resume=must")
    assert run_distributed("tests.training.jobs:train", 2, path, settings)[0]["finished"]
    assert reproducible_events(run) == log
    again = load_file(run / "hf" / "model.safetensors")
    assert again.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(again[key], weight), key
