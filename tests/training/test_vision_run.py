"""Vision runs: two ranks do what one process does, resumed runs repeat uninterrupted ones, and stages begin where the
last one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from s2moe.config import load
from s2moe.config.vision import VisionRunConfig
from s2moe.data.images import open_images
from s2moe.models.vision import MixtureConfig, MixtureModel
from s2moe.training import metrics_log
from s2moe.training.image_evaluation import evaluate_images
from s2moe.training.processes import Processes
from s2moe.training.vision import ImageFeed, read_evaluation
from s2moe.training.vision_initial import load_vision_model
from tests.distributed_harness import DistributedError, run_distributed
from tests.run_logs import reproducible_events
from tests.training import vision_jobs

pytestmark = pytest.mark.distributed

ATTENTIVE = {"model.gate": "attentive"}
STEPS = ["data.name=digits", "training.steps=1", "training.global_batch=16"]


def run(output: Path, settings: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    return run_distributed(vision_jobs.run, ranks, str(output), settings)[0]


def weights(output: Path) -> dict[str, Any]:
    return load_file(output / "run" / "hf" / "model.safetensors")


def events(output: Path) -> list[dict[str, Any]]:
    return metrics_log.read(output / "run" / "metrics.jsonl")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run(output, ATTENTIVE)
    return output


def test_a_run_leaves_what_it_promises(alone: Path) -> None:
    directory = alone / "run"
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "hf/config.json", "curves.png"):
        assert (directory / name).is_file(), name
    training = [event for event in events(alone) if "train/loss" in event]
    assert [event["step"] for event in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["images"] == training[-1]["samples"] == 6 * 32
    assert training[-1]["epoch"] == pytest.approx(6 * 32 / 1442)
    for key in ("train/error", "train/h_s", "train/h_u", "images_per_second", "lr", "grad_norm"):
        assert key in training[-1]
    assert not any("token" in key or "bpc" in key for key in training[-1])
    assert [event["step"] for event in events(alone) if "val/error" in event] == [3, 6]


def test_the_evaluation_file_agrees_with_itself(alone: Path) -> None:
    found = read_evaluation(alone / "run")
    assert found["images"] == sum(map(sum, found["selection"])) == 355
    assert len(found["selection"]) == 5
    assert 0 <= found["figures"]["h_s"] <= found["figures"]["h_u"]
    # log(y + 1e-7) sums to one only almost
    assert found["figures"]["loss"] == pytest.approx(found["figures"]["task_loss"], abs=1e-5)


def test_the_exported_model_scores_what_was_logged(alone: Path) -> None:
    from s2moe.data.images import batch_in_order, open_images

    pixels, labels_B = batch_in_order(open_images("digits"), 0, 355)
    output = load_vision_model(alone / "run")(pixel_values=pixels, labels=labels_B)
    found = read_evaluation(alone / "run")["figures"]
    assert (output.logits.argmax(-1) != labels_B).double().mean().item() == pytest.approx(found["error"], abs=1e-9)
    assert output.task_loss.item() == pytest.approx(found["task_loss"], abs=1e-5)


def test_what_was_before_training_is_kept_over_a_resume(tmp_path: Path) -> None:
    """The second half of a run does not measure its own start."""
    run(tmp_path / "whole", ATTENTIVE)
    run(tmp_path / "parts", {**ATTENTIVE, "training.stop_after_minutes": 1e-9})
    run(tmp_path / "parts", {**ATTENTIVE, "checkpoint.resume": "must"})
    whole, parts = (read_evaluation(tmp_path / name / "run")["figures"] for name in ("whole", "parts"))
    assert whole == parts
    assert whole["h_s"] != whole["h_s_before"] > 2  # an untrained gate is even: log2 of 5 experts is 2.32
    assert abs(whole["pes_before"]) < 0.2


def test_the_seed_of_a_run_is_that_of_the_order_of_its_images() -> None:
    seen = []
    for seed in (1, 2):
        config = load(VisionRunConfig, None, ["name=x", "model.architecture=digits", *STEPS, f"seed={seed}"])
        feed = ImageFeed(config, Processes(0, 0, 1, torch.device("cpu")), config.open_images())
        seen.append(feed.inputs(0, 0)["labels"])
    assert not seen[0].equal(seen[1])


def test_a_model_in_training_mode_is_not_evaluated() -> None:
    images, processes = open_images("digits"), Processes(0, 0, 1, torch.device("cpu"))
    model = MixtureModel(MixtureConfig(architecture="digits", image_size=8)).train()
    with pytest.raises(ValueError, match="the model is in training mode"):
        evaluate_images(model, images, 60, processes)
    assert evaluate_images(model.eval(), images, 60, processes).images == 355


def test_two_ranks_do_what_one_process_does(alone: Path, tmp_path: Path) -> None:
    run(tmp_path, ATTENTIVE, ranks=2)
    for one, two in zip(events(alone), events(tmp_path), strict=True):
        for key in ("train/loss", "grad_norm", "val/error", "val/loss", "val/h_s", "val/h_u", "val/mi_pred"):
            if key in one:
                assert two[key] == pytest.approx(one[key], abs=2e-5), (one["step"], key)
    for name, weight in weights(alone).items():
        assert weights(tmp_path)[name].allclose(weight, atol=2e-5), name


def test_what_is_drawn_at_test_depends_on_the_block_alone() -> None:
    settings = {"name": "run", "seed": 4, "model.kind": "vae", "model.encoder": "lite", "evaluation.batch": 20}
    settings |= {
        "data.name": "synthetic_strokes",
        "data.options": "{train: 4, test: 18}",
    }  # five blocks, the last of 10
    (one,), two = (run_distributed(vision_jobs.score, ranks, settings) for ranks in (1, 2))
    assert two == [pytest.approx(one)] * 2
    assert run_distributed(vision_jobs.score, 1, {**settings, "seed": 5})[0]["recon"] != one["recon"]


def test_two_ranks_with_batch_normalisation_do_what_one_process_does(tmp_path: Path) -> None:
    settings = {"model.architecture": "cifar100", "model.num_experts": 2, "training.steps": 2, "evaluation.every": 0}
    settings |= {"data.max_test": 40, "data.name": "synthetic_strokes", "data.options": "{train: 10, test: 10}"}
    settings |= {"training.global_batch": 8}
    for ranks in (1, 2):
        run(tmp_path / str(ranks), settings, ranks)
    one, two = (weights(tmp_path / str(ranks)) for ranks in (1, 2))
    statistics = [name for name in one if "running" in name]
    assert statistics
    for name in statistics:
        assert two[name].allclose(one[name], atol=1e-4, rtol=1e-4), name
    losses = [[e["train/loss"] for e in events(tmp_path / str(n)) if "train/loss" in e] for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings = {"model.form": "stochastic", "model.importance_loss": 0.2, "data.augmentation": "flip_crop"}
    run(tmp_path / "whole", settings, ranks=2)
    first = run(tmp_path / "parts", {**settings, "training.stop_after_minutes": 1e-9}, ranks=2)
    assert (first["finished"], first["step"]) == (False, 1)
    assert run(tmp_path / "parts", {**settings, "checkpoint.resume": "must"}, ranks=2)["finished"]
    assert reproducible_events(tmp_path / "parts" / "run") == reproducible_events(tmp_path / "whole" / "run")
    for name, weight in weights(tmp_path / "whole").items():
        assert weight.equal(weights(tmp_path / "parts")[name]), name


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_other_optimizers_resume_exactly(tmp_path: Path, name: str) -> None:
    settings = {"optimizer.name": name, "training.steps": 4, "evaluation.every": 0}
    run(tmp_path / "whole", settings)
    run(tmp_path / "parts", {**settings, "training.stop_after_minutes": 1e-9})
    run(tmp_path / "parts", {**settings, "checkpoint.resume": "must"})
    for key, weight in weights(tmp_path / "whole").items():
        assert weight.equal(weights(tmp_path / "parts")[key]), key


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimizer.name": "sgd"}, "optimizer.name was adam, is sgd"),
        ({"model.gate": "original"}, "model.gate was attentive, is original"),
        ({"data.augmentation": "flip_crop"}, "the training data was .*:none, is .*:flip_crop"),
    ],
)
def test_another_run_is_refused(alone: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(DistributedError, match=f"cannot continue from .*{told}"):
        run(alone, {**ATTENTIVE, **change})


def test_distillation_keeps_the_experts(alone: Path, tmp_path: Path) -> None:
    settings = {"init.weights": alone / "run", "init.stage": "distil", "model.frozen": "experts", "seed": 2}
    assert run(tmp_path, settings)["finished"]
    teacher, student = weights(alone), weights(tmp_path)
    for name, weight in teacher.items():
        if name.startswith("experts."):
            assert student[name].equal(weight), name
    assert not student["gate.trunk.fc1.weight"].equal(teacher["gate.trunk.fc1.weight"])
    assert "error_top1" in read_evaluation(tmp_path / "run")["figures"]
    run(tmp_path / "begun", {**settings, "training.steps": 1, "optimizer.lr": 1e-30})
    for name, weight in teacher.items():  # the trunk that makes a gate's features is the teacher's too
        if name.startswith("gate.trunk."):
            assert weights(tmp_path / "begun")[name].equal(weight), name


def test_a_stage_says_which_settings_it_needs(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(DistributedError, match=r"model.frozen: init.stage=distil makes it experts, got none"):
        run(tmp_path, {"init.weights": alone / "run", "init.stage": "distil"})


def test_begun_with_all_weights(alone: Path, tmp_path: Path) -> None:
    run(tmp_path, {**ATTENTIVE, "init.weights": alone / "run", "optimizer.lr": 1e-30, "training.steps": 1})
    for name, weight in weights(alone).items():
        assert weights(tmp_path)[name].equal(weight), name


def test_an_unfinished_run_has_no_weights_to_begin_with(tmp_path: Path) -> None:
    with pytest.raises(DistributedError, match="holds no finished run"):
        run(tmp_path, {"init.weights": tmp_path / "nothing"})


def test_two_ranks_that_share_the_experts_do_what_one_process_does(tmp_path: Path) -> None:
    settings = {"model.kind": "vmoe", "model.architecture": None, "model.size": "digits/2", "training.steps": 3}
    settings |= {"evaluation.every": 0, "training.micro_batch": 16}
    run(tmp_path / "one", settings)
    run(tmp_path / "two", {**settings, "training.expert_parallel": 2, "training.zero_stage": 3}, ranks=2)
    for one, two in zip(events(tmp_path / "one"), events(tmp_path / "two"), strict=True):
        for key in ("train/loss", "train/aux_loss", "grad_norm", "val/error", "val/loss"):
            if key in one:
                assert two[key] == pytest.approx(one[key], abs=2e-4), (one["step"], key)
    for name, weight in weights(tmp_path / "one").items():
        assert weights(tmp_path / "two")[name].allclose(weight, atol=2e-4), name
    begun = {**settings, "init.weights": tmp_path / "two" / "run", "optimizer.lr": 1e-30, "training.expert_parallel": 2}
    run(tmp_path / "begun", {**begun, "training.steps": 1}, ranks=2)
    for name, weight in weights(tmp_path / "two").items():
        assert weights(tmp_path / "begun")[name].equal(weight), name


@pytest.mark.slow
def test_every_step_of_the_schedule_is_that_of_its_epoch(tmp_path: Path) -> None:
    settings = {"schedule.kind": "step", "schedule.step_epochs": 1, "training.steps": 100, "evaluation.every": 0}
    run(tmp_path, {**settings, "training.global_batch": 64})
    rates = {event["step"]: event["lr"] for event in events(tmp_path) if "lr" in event}
    for step, rate in rates.items():
        assert rate == pytest.approx(1e-3 / 3 ** ((step - 1) * 64 // 1442))
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["step"] == 100
