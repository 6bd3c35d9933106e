"""Fine-tuning with expert parallelism and ZeRO under transformers' Trainer and under accelerate, on two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from s2moe import S2MoEForSequenceClassification
from s2moe.finetuning.trainer import COMPLETE
from tests.distributed_harness import run_distributed

from .trainer_jobs import REFUSED, accelerate_run, pretrained, refusals, spread_run, weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    router = {"bias_update_rate": 0.01, "combine": "sigmoid", "balance_loss": 0.1}
    return pretrained(tmp_path_factory.mktemp("bias"), router=router)


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Expert parallel 1 at ZeRO 1: what it reported, and the weights it saved."""
    reported, saved = run(tmp_path_factory.mktemp("reference"), source, 1, 1)
    assert reported["clear"]  # of ties between experts
    return reported, saved


def run(output: Path, source: Path, degree: int, stage: int, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    resume = settings.pop("resume", False)
    first, second = run_distributed(spread_run, 2, str(output), str(source), degree, stage, settings, resume)
    for name in ("losses", "biases", "eval"):
        assert first.get(name) == second.get(name)
    return first, {} if "error" in first else weights(output / "final")


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_expert_ranks_equal_one(source: Path, reference: Any, tmp_path: Path, stage: int) -> None:
    """In losses, gradient norms, evaluation and saved weights: those of all experts, not rank 0's."""
    expected, expected_weights = reference
    found, found_weights = run(tmp_path, source, 2, stage)
    assert (expected["experts"], found["experts"]) == (4, 2)
    for name in ("losses", "aux", "norms", "eval"):
        assert found[name] == pytest.approx(expected[name], rel=2e-4), name
    assert found_weights.keys() == expected_weights.keys()
    for name, weight in found_weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-5, msg=name)
    model = S2MoEForSequenceClassification.from_pretrained(tmp_path / "final")
    assert model.model.layers[0].moe.experts.w1.shape[0] == 4
    assert model.model.layers[0].moe.router.bias_E.abs().max() > 0


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_resuming_and_the_best_model(tmp_path: Path, stage: int) -> None:
    """With dropout and S2MoE's noise, to the bit; then the best checkpoint's weights are the model's."""
    source = pretrained(tmp_path / "source", dropout=0.1, method="s2moe")
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.5,  # it gets worse after the first steps
    }
    output = tmp_path / "run"
    whole, whole_weights = run(output, source, 2, stage, **settings)
    best = Path(whole["best"])
    saved = weights(best)
    assert all(value.equal(saved[name]) for name, value in whole_weights.items())
    shutil.rmtree(output / "checkpoint-4")
    resumed, resumed_weights = run(output, source, 2, stage, resume=True, **settings)
    assert resumed["losses"] == whole["losses"]
    assert resumed["eval"] == whole["eval"]
    assert all(value.equal(whole_weights[name]) for name, value in resumed_weights.items())
    assert (output / "checkpoint-4" / COMPLETE).exists()
    if stage == 2:
        refused, _ = run(output, source, 1, stage, resume=True, **settings)
        assert "expert_parallel was 2, is 1" in refused["error"]


def test_what_would_go_wrong_without_an_error_is_refused(source: Path, tmp_path: Path) -> None:
    messages = run_distributed(refusals, 2, str(source), str(tmp_path))[0]
    for name, message in REFUSED.items():
        assert message in messages[name], name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_models_built_for_one_process(source: Path, reference: Any, tmp_path: Path, stage: int) -> None:
    """As transformers builds them, under DistributedDataParallel and DeepSpeed: loads count over all ranks too."""
    expected, expected_weights = reference
    found, found_weights = run(tmp_path, source, 0, stage)
    for name in ("losses", "aux", "norms", "eval"):
        assert found[name] == pytest.approx(expected[name], rel=2e-4), name
    for name, weight in found_weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_accelerate_alone(source: Path, tmp_path: Path) -> None:
    """A loop of one's own with accelerate's DeepSpeed plugin: expert parallel 2 equals 1."""
    one = run_distributed(accelerate_run, 2, str(source), 1, 1, str(tmp_path / "one"))
    two = run_distributed(accelerate_run, 2, str(source), 2, 3, str(tmp_path / "two"))
    assert two[0] == pytest.approx(one[0], rel=2e-4)
    saved = weights(tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-5, msg=name)
