"""Upcycled models of other architectures under the Trainer, with expert parallelism and ZeRO, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from s2moe import S2MoEForCausalLM, upcycle
from s2moe.finetuning.loading import load_pretrained
from s2moe.finetuning.trainer import cpu_processes, deepspeed_settings
from s2moe.parallel import deepspeed_compat
from tests.distributed_harness import run_distributed
from tests.hub.foreign import foreign

from .trainer_jobs import VOCABULARY, arguments, pretrained, spread_run, weights

pytestmark = pytest.mark.distributed


def upcycled(name: str, directory: Path) -> Path:
    """A model with routers and experts that differ, saved."""
    torch.manual_seed(3)
    dense = foreign(name, vocab_size=VOCABULARY, initializer_range=0.1)
    balanced = {"router": {"balance_loss": 0.1}}
    upcycle(dense, "smoe", experts=4, noise=0.3, moe=balanced).save_pretrained(directory)
    return directory


def run(output: Path, source: Path, degree: int, stage: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    first, second = run_distributed(spread_run, 2, str(output), str(source), degree, stage, {})
    assert first["losses"] == second["losses"]
    return first, weights(output / "final")


@pytest.mark.parametrize(
    ("name", "stage"), [("llama", 3), *(pytest.param("gpt2", stage, marks=pytest.mark.slow) for stage in (1, 2, 3))]
)
def test_two_expert_ranks_equal_one(tmp_path: Path, name: str, stage: int) -> None:
    """In losses, gradient norms, evaluation and the weights that are saved."""
    source = upcycled(name, tmp_path / "source")
    expected, expected_weights = run(tmp_path / "one", source, 1, 1)
    found, found_weights = run(tmp_path / "two", source, 2, stage)
    assert (expected["experts"], found["experts"], expected["clear"]) == (4, 2, True)
    assert all(value > 0.05 for value in found["aux"])
    for figure in ("losses", "aux", "norms", "eval"):
        assert found[figure] == pytest.approx(expected[figure], rel=2e-4), figure
    assert found_weights.keys() == expected_weights.keys()
    for key, weight in found_weights.items():
        torch.testing.assert_close(weight, expected_weights[key], rtol=1e-4, atol=1e-5, msg=key)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two" / "final")
    assert model.config.model_type == f"s2moe_{name}"
    torch.testing.assert_close(model.score.weight, found_weights["score.weight"])


def models_under_zero3(source: str, native: str, output: str) -> dict[str, float]:
    """Build and read models after TrainingArguments of ZeRO 3; how far they are from what they should be."""
    args = arguments(output, deepspeed=deepspeed_settings(3), **cpu_processes())
    torch.manual_seed(4)
    dense = foreign("llama", vocab_size=VOCABULARY)
    made = upcycle(dense, experts=4)
    ids = torch.arange(12)[None]
    errors = {"upcycle": (made(ids).logits - dense(ids).logits).abs().max().item()}
    for path in (source, native):
        read, wanted = AutoModelForCausalLM.from_pretrained(path), load_pretrained(AutoModelForCausalLM, path)
        pairs = zip(read.state_dict().values(), wanted.state_dict().values(), strict=True)
        errors[path] = max((one - other).abs().max().item() for one, other in pairs)
    assert args.hf_deepspeed_config.is_zero3()
    return errors


def test_models_are_built_after_the_arguments_of_zero_3(tmp_path: Path) -> None:
    source = upcycled("llama", tmp_path / "source")
    native = pretrained(tmp_path / "native")
    for errors in run_distributed(models_under_zero3, 2, str(source), str(native), str(tmp_path / "run")):
        assert len(errors) == 3
        assert errors.pop("upcycle") < 1e-5
        assert set(errors.values()) == {0.0}


def refused_saving(source: str, output: str) -> str:
    """The error of saving a part of the experts as if it were the whole."""
    model = load_pretrained(AutoModelForCausalLM, source, deepspeed_compat.expert_parallel(2))
    try:
        model.save_pretrained(output)
    except ValueError as error:
        return str(error)
    return ""


def test_a_part_of_the_experts_is_not_saved_as_the_whole(tmp_path: Path) -> None:
    source = upcycled("llama", tmp_path / "source")
    for error in run_distributed(refused_saving, 2, str(source), str(tmp_path / "saved")):
        assert "this process has 1/2 of the experts" in error
    with pytest.raises(ValueError, match="s2moe_llama"):
        load_pretrained(S2MoEForCausalLM, source)
