"""Frozen routers and experts on the DeepSpeed engine: not a bit of them moves, in any layout, over resumes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from s2moe.data import ByteTokenizer, write_corpus
from s2moe.training.weights import load_run_weights
from tests.distributed import jobs, run_jobs
from tests.distributed.test_expert_parallel import merged
from tests.distributed_harness import DistributedError, run_distributed

pytestmark = pytest.mark.distributed

SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (2, 3)]
PARTS = {
    "routers": (".router.",),
    "experts": (".experts.", ".shared."),
    "routers_and_experts": (".router.", ".experts.", ".shared."),
}


def is_frozen(name: str, freeze: str) -> bool:
    return any(part in name for part in PARTS[freeze])


@pytest.mark.parametrize(
    ("moe", "freeze"),
    [
        ({"method": "xmoe", "shared_experts": 1}, "routers_and_experts"),
        pytest.param({"method": "s2moe"}, "experts", marks=pytest.mark.slow),
        ({"method": "loss_free", "router": {"bias_update_rate": 0.01}}, "routers"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["method"],
)
def test_frozen_weights_stay_and_the_layout_does_not_matter(moe: dict[str, Any], freeze: str) -> None:
    results = run_distributed(jobs.train_shapes, 2, SHAPES, 4, moe, None, freeze)
    torch.manual_seed(0)
    initial = jobs.S2MoEForCausalLM(jobs.tiny_config(**moe)).state_dict()
    reference, reference_state = results[0][SHAPES[0]], merged(results, SHAPES[0])
    for shape in SHAPES:
        for result in results:
            run = result[shape]
            assert run["losses"] == pytest.approx(reference["losses"], rel=2e-5), shape
            assert run["norms"] == pytest.approx(reference["norms"], rel=2e-4), shape
            for name, buffer in run["buffers"].items():  # a selection bias is the router's
                moves = "bias_E" in name and freeze == "experts"
                assert moves or buffer.equal(initial.get(name, buffer)), (shape, name)
        for name, parameter in merged(results, shape).items():
            if is_frozen(name, freeze):
                assert parameter.equal(initial[name]), (shape, name)
            else:
                assert not parameter.equal(initial[name]), (shape, name)
                torch.testing.assert_close(parameter, reference_state[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision(stage: int) -> None:
    """bf16 runs through other classes of DeepSpeed."""
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    moe = {"method": "xmoe"}
    results = run_distributed(jobs.train_shapes, 2, [(2, stage)], 2, moe, half, "routers_and_experts")
    torch.manual_seed(0)
    initial = jobs.S2MoEForCausalLM(jobs.tiny_config(**moe)).state_dict()
    for name, parameter in merged(results, (2, stage)).items():
        stayed = parameter.equal(initial[name].bfloat16().float())
        assert stayed == is_frozen(name, "routers_and_experts") or "norm" in name, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_brings_frozen_weights_back(tmp_path: Path, stage: int) -> None:
    for same in run_distributed(jobs.frozen_restore, 2, stage, str(tmp_path)):
        assert all(same.values()), [name for name, equal in same.items() if not equal]


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("corpus") / "text"
    words = random.Random(0).choices(["sparse ", "mixture ", "of ", "experts "], k=2000)
    text = "".join(words)
    write_corpus(directory, "words", {"train": text, "valid": text[:700], "test": text[:300]}, ByteTokenizer())
    return str(directory)


def run(corpus: str, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return run_distributed(run_jobs.run, 2, corpus, str(output), settings, None, 0)[0]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "run" / "hf" / "model.safetensors")


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_a_frozen_run_resumes_and_exports(corpus: str, tmp_path: Path, stage: int) -> None:
    settings = {
        "model.moe.method": "loss_free",
        "training.zero_stage": stage,
        "training.freeze": "routers_and_experts",
        "training.steps": 4,
        "evaluation.every": 0,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(corpus, whole, settings)
    assert not run(corpus, parts, {**settings, "training.stop_after_minutes": 1e-9})["finished"]
    for other in ("none", "experts"):
        with pytest.raises(DistributedError, match=r"training\.freeze was routers_and_experts"):
            run(corpus, parts, {**settings, "training.freeze": other})
    stopped = load_run_weights(parts / "run").state_dict()  # from the checkpoint
    assert run(corpus, parts, settings)["finished"]

    ours, theirs = weights(parts), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.equal(theirs[name]), name
        if is_frozen(name, "routers_and_experts"):
            assert weight.equal(stopped[name]), name
        else:
            assert not weight.equal(stopped[name]), name
    assert not any(weight.any() for name, weight in ours.items() if "bias_E" in name)
