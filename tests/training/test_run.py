"""Whole runs on a tiny model: what a run leaves behind, continuing exactly, stopping at a bad loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from s2moe.config import load, to_dict
from s2moe.config.run import RunConfig
from s2moe.training.agreement import changed_settings
from s2moe.training.checkpoint import TrainingState, find_latest
from s2moe.training.evaluation import Score
from s2moe.training.metrics_log import read
from s2moe.training.report import report
from s2moe.training.run import Result, changes_of_shape
from s2moe.training.run_directory import PRETRAINING, sign
from s2moe.training.weights import Weights, find_weights, load_weights
from tests.distributed_harness import DistributedError, run_distributed
from tests.run_logs import reproducible_events

from . import vision_jobs
from .jobs import DISK, GRADIENT, contents, tiny_run

TRAIN, SAYING = "tests.training.jobs:train", "tests.training.jobs:train_saying"


def run(directory: Path, *overrides: str, ranks: int = 1, poison: Any = None) -> dict[str, Any]:
    path, common = tiny_run(directory)
    return run_distributed(TRAIN, ranks, path, [*common, *overrides], poison)[0]


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    return reproducible_events(directory / "runs" / name)


def weights(directory: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(directory / "runs" / name / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished, uninterrupted run `whole`."""
    directory = tmp_path_factory.mktemp("finished")
    assert run(directory, "name=whole")["finished"]
    return directory


def test_a_run_leaves_what_the_convention_says(finished: Path) -> None:
    directory = finished / "runs" / "whole"
    names = {"run.json", "config.yaml", "metrics.jsonl", "curves.png", "tensorboard", "checkpoints", "hf"}
    assert {path.name for path in directory.iterdir()} == names
    resolved = load(RunConfig, directory / "config.yaml")
    assert resolved.model["vocab_size"] == 256
    assert to_dict(resolved)["training"]["steps"] == 6
    latest = find_latest(directory / "checkpoints")
    assert latest is not None
    assert (latest.state.step, latest.state.samples, latest.state.tokens) == (6, 24, 768)
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert list((directory / "tensorboard").iterdir())


def test_metrics(finished: Path) -> None:
    log = events(finished, "whole")
    training = [event for event in log if "train/loss" in event]
    assert [event["step"] for event in training] == [1, 2, 3, 4, 5, 6]
    first = training[0]
    assert first["train/bpc"] == pytest.approx(first["train/task_loss"] / 0.6931471805599453)
    assert first["train/loss"] == pytest.approx(first["train/task_loss"] + first["train/aux_loss"], rel=1e-5)
    assert [event["lr"] for event in training[:3]] == pytest.approx([0.005, 0.01, 0.01])
    for layer in (0, 1):
        for figure in ("load_entropy", "max_violation", "gate_mean", "noise_std", "agreement", "infonce_accuracy"):
            assert f"layer_{layer}/{figure}" in first
    assert training[-1]["train/loss"] < first["train/loss"]
    validations = [event for event in log if "val/bpc" in event]
    assert [(event["step"], event["val/symbols"]) for event in validations] == [(3, 200), (6, 600)]
    assert "tokens_per_second" in read(finished / "runs" / "whole" / "metrics.jsonl")[0]


def test_exported_directory_is_the_newest_checkpoint(finished: Path) -> None:
    run_directory = finished / "runs" / "whole"
    latest = find_latest(run_directory / "checkpoints")
    assert find_weights(run_directory).hf == run_directory / "hf"
    exported = AutoModelForCausalLM.from_pretrained(run_directory / "hf").eval()
    checkpoint = load_weights(Weights(checkpoint=latest))
    ids = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, checkpoint(ids).logits)
    assert json.loads((run_directory / "hf" / "training.json").read_text()) == {"run": "whole", "step": 6}


def test_interrupted_and_continued_equals_uninterrupted(finished: Path) -> None:
    """Each start does one step, until the last one, which does the rest."""
    for step in (1, 2, 3):
        answer = run(finished, "name=parts", "training.stop_after_minutes=1e-9")
        assert (answer["step"], answer["finished"]) == (step, False)
    assert run(finished, "name=parts", "checkpoint.resume=must")["finished"]
    assert events(finished, "parts") == events(finished, "whole")
    whole, parts = weights(finished, "whole"), weights(finished, "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_finished_run_started_again_only_reports(finished: Path) -> None:
    before = events(finished, "whole")
    answer = run(finished, "name=whole")
    assert (answer["step"], answer["finished"]) == (6, True)
    assert answer["bpc"] == pytest.approx(before[-1]["val/bpc"])
    assert events(finished, "whole") == before


def test_finished_run_without_checkpoints_says_so_and_other_runs_keep_off(finished: Path, tmp_path: Path) -> None:
    directory = finished / "runs" / "whole"
    kept = (directory / "checkpoints").rename(tmp_path / "checkpoints")
    try:
        before = contents(directory)
        assert run(finished, "name=whole") == {"step": 6, "finished": True, "bpc": None}
        assert (
            "no checkpoint is left to continue from to step 7"
            in run(finished, "name=whole", "training.steps=7")["error"]
        )
        with pytest.raises(DistributedError, match="whole is of a pre-training run, 'whole', and this is a vision run"):
            run_distributed(vision_jobs.run, 1, str(finished / "runs"), {"name": "whole"})
        assert contents(directory) == before
    finally:
        kept.rename(directory / "checkpoints")


def test_damaged_newest_checkpoint_falls_back(finished: Path) -> None:
    assert run(finished, "name=hurt")["finished"]
    next((finished / "runs/hurt/checkpoints/step-00000006").glob("zero_*")).write_bytes(b"")
    assert run(finished, "name=hurt")["finished"]
    assert events(finished, "hurt") == events(finished, "whole")


def test_two_ranks_of_experts(finished: Path) -> None:
    """The experts of both ranks reach hf/ and the checkpoint reader alike, also under ZeRO-3."""
    for stage in (1, 3):
        name = f"pair{stage}"
        answer = run(
            finished,
            f"name={name}",
            "training.expert_parallel=2",
            f"training.zero_stage={stage}",
            "training.steps=2",
            "training.micro_batch=null",
            "model.tie_word_embeddings=true",
            "model.moe.router.bias_update_rate=0.01",
            ranks=2,
        )
        assert answer["finished"]
        directory = finished / "runs" / name
        exported = load_weights(find_weights(directory)).state_dict()
        checkpoint = load_weights(Weights(checkpoint=find_latest(directory / "checkpoints"))).state_dict()
        assert exported.keys() == checkpoint.keys()
        for key, tensor in exported.items():
            assert torch.equal(tensor, checkpoint[key]), key
        assert exported["model.layers.0.moe.experts.w1"].shape == (4, 32, 32)
        assert exported["model.layers.0.moe.router.bias_E"].abs().max() > 0


def test_recomputing_activations_changes_nothing(finished: Path) -> None:
    """The repeated forward pass draws the same dropout and the same noise."""
    for name, recompute in (("kept", "false"), ("recomputed", "true")):
        answer = run(
            finished,
            f"name={name}",
            f"training.activation_checkpointing={recompute}",
            "training.expert_parallel=2",
            "training.micro_batch=null",
            "training.steps=3",
            ranks=2,
        )
        assert answer["finished"]
    assert events(finished, "recomputed") == events(finished, "kept")


@pytest.mark.parametrize("module", ["model.layers.1.moe", "model.layers.0.attention", "lm_head"])
def test_non_finite_loss_stops_and_names_step_rank_and_layer(finished: Path, module: str) -> None:
    name = f"bad-{module.rsplit('.')[-1]}"
    answer = run(
        finished,
        f"name={name}",
        "training.expert_parallel=2",
        "training.micro_batch=null",
        "checkpoint.every=2",
        ranks=2,
        poison=(1, 3, module),
    )
    assert "stopped at step 4" in answer["error"]
    assert "on rank 1" in answer["error"]
    assert f"rank 1: the first non-finite values are in the output of {module}" in answer["error"]
    latest = find_latest(finished / "runs" / name / "checkpoints")
    assert latest is not None
    assert latest.state.step == 2
    assert all(torch.isfinite(p).all() for p in load_weights(Weights(checkpoint=latest)).parameters())
    assert events(finished, name)[-1]["step"] == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_non_finite_gradient_stops_before_it_is_saved(finished: Path, ranks: int) -> None:
    name = f"gradient{ranks}"
    batch = "training.micro_batch=null"
    answer = run(finished, f"name={name}", batch, "logging.every=100", ranks=ranks, poison=(0, 3, GRADIENT))
    assert "stopped at step 4: the gradient is not finite (norm " in answer["error"]
    latest = find_latest(finished / "runs" / name / "checkpoints")
    assert latest is not None
    assert latest.state.step == 2


def test_a_full_disk_on_one_rank_ends_both_with_one_error(finished: Path) -> None:
    path, common = tiny_run(finished)
    overrides = [*common, "name=full", "training.micro_batch=null", "training.expert_parallel=2"]
    answers = run_distributed(TRAIN, 2, path, overrides, (1, 3, DISK))
    assert answers[0] == answers[1]
    assert "cannot write the checkpoint step-" in answers[0]["error"]
    assert "No space left on device: make room; there is no checkpoint yet" in answers[0]["error"]
    assert not list((finished / "runs" / "full" / "checkpoints").glob(".tmp-*"))
    assert run_distributed(TRAIN, 2, path, overrides, None)[0]["finished"]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_changed_weight_decay_counts_after_resuming(finished: Path, stage: int) -> None:
    shape = (f"training.zero_stage={stage}", "model.hidden_dropout=0", "training.steps=4", "checkpoint.keep=9")
    sums = {}
    for name, decay in (("same", "0.1"), ("decayed", "50")):
        common = (f"name={name}{stage}", *shape)
        assert run(finished, *common, "optimizer.weight_decay=0.1")["finished"]
        runs = finished / "runs" / f"{name}{stage}"
        shutil.rmtree(runs / "checkpoints" / "step-00000004")
        assert run(finished, *common, f"optimizer.weight_decay={decay}")["finished"]
        sums[name] = {key: float(value.abs().sum()) for key, value in weights(finished, f"{name}{stage}").items()}
    assert sums["decayed"]["lm_head.weight"] < 0.9 * sums["same"]["lm_head.weight"]
    assert sums["decayed"]["model.norm.weight"] > 0.9 * sums["same"]["model.norm.weight"]


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {}, ""),
        ({}, {"micro_batch": 4}, ""),  # what it was anyhow
        (
            {"micro_batch": 2},
            {},
            ". Micro-batches of 4 sequences instead of 2: dropout and noise are drawn otherwise than they would have "
            "been, which training.micro_batch=2 avoids",
        ),
        (
            {"micro_batch": 2},
            {"micro_batch": 2, "sequence_parallel": 2},
            ". Sequences in 2 parts instead of 1: dropout and noise are drawn otherwise than they would have been, "
            "which training.sequence_parallel=1 avoids",
        ),
        (
            {},
            {"sequence_parallel": 2},
            ". Sequences in 2 parts instead of 1: dropout and noise are drawn otherwise than they would have been, "
            "which training.sequence_parallel=1 with training.micro_batch=4 avoids",
        ),
    ],
)
def test_noise_drawn_otherwise_is_said_in_the_same_shape_too(
    finished: Path, before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    path, common = tiny_run(finished)
    batches = [{"global_batch": 8, "micro_batch": None, "sequence_parallel": 1, **values} for values in (before, now)]
    states, config = [], None
    for values in batches:
        words = [f"training.{key}={'null' if value is None else value}" for key, value in values.items()]
        config = load(RunConfig, path, [*common, "name=noise", "model.moe.method=smoe", *words])
        states.append(TrainingState(world_size=2, config=to_dict(config)))
    assert config is not None
    assert changes_of_shape(config, *states) == said
    other = changes_of_shape(config, replace(states[0], expert_parallel=2), states[1])
    assert other.startswith("; it was written with 2 processes, training.expert_parallel=2, ")
    assert other.endswith(said)


def test_changed_settings_are_said_when_a_run_goes_on(finished: Path) -> None:
    changed = ["training.steps=7", "optimizer.lr=0.02", "checkpoint.keep=5", "logging.every=2"]
    path, common = tiny_run(finished)
    begun = [*changed, f"init.weights={finished / 'runs' / 'whole'}"]
    for name, overrides in (("first", []), ("second", changed), ("third", changed), ("fourth", begun)):
        answer, said = run_distributed(SAYING, 1, path, [*common, "name=changed", *overrides])[0]
        assert answer["finished"], answer
        lines = [line for line in said if "settings changed" in line]
        expected = "settings changed since that checkpoint: optimizer.lr 0.01 -> 0.02, training.steps 6 -> 7"
        assert lines == ([expected] if name == "second" else [])
        assert ("init changes nothing here: it is for a run's first start" in said) == (name == "fourth")


def test_changed_settings() -> None:
    before = {"model": {"size": 2, "sizes": [1, 2]}, "old": None, "logging": {"every": 1}}
    now = {"model": {"size": None, "sizes": (1, 2)}, "new": {"every": 3}, "logging": {"every": 2}}
    assert changed_settings(before, now) == "model.size 2 -> null, new.every (none) -> 3, old null -> (none)"
    assert changed_settings(before, before) == ""


def test_fewer_steps_than_done_are_refused(finished: Path) -> None:
    answer = run(finished, "name=whole", "training.steps=4")
    assert "step-00000006 is beyond it, got 4: ask for at least 6 steps, or start a new run" in answer["error"]


def test_results_of_an_attempt_without_checkpoint_go(finished: Path) -> None:
    directory = finished / "runs" / "again"
    (directory / "hf").mkdir(parents=True)
    sign(directory, PRETRAINING, "again")
    (directory / "curves.png").write_text("old")
    assert not run(finished, "name=again", "training.stop_after_minutes=1e-9")["finished"]
    assert not (directory / "hf").exists()
    assert not (directory / "curves.png").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.precision=fp16", "training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU"),
        ("logging.sample_prompt=''", "logging.sample_prompt: '' has no token"),
    ],
)
def test_impossible_before_training_starts(finished: Path, override: str, message: str) -> None:
    assert message in run(finished, "name=impossible", override)["error"]
    assert not (finished / "runs" / "impossible").exists()


def test_a_failing_sample_does_not_lose_the_report(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, overrides = tiny_run(finished)
    config = load(RunConfig, path, [*overrides, "name=whole"])
    latest = find_latest(finished / "runs" / "whole" / "checkpoints")
    assert latest is not None
    result = Result(finished / "runs" / "whole", True, latest.state, Score(100.0, 600, 600), Path("nowhere"))
    text = report(config, result)
    assert text.startswith("6 steps, 768 tokens")
    assert "no sample: " in text
    assert text.endswith("run directory: " + str(result.directory))
