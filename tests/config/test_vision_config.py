"""Settings of vision runs: what is refused, and with which words; what the data decides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2moe.config import ConfigError, load, to_yaml
from s2moe.config.run import ScheduleConfig
from s2moe.config.vision import VisionRunConfig, explain_kinds
from s2moe.models.vision import VISION_KINDS
from s2moe.training.schedule import lr_multiplier

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "vision").glob("*.yaml"))


def config(*overrides: str) -> VisionRunConfig:
    return load(VisionRunConfig, None, ["name=x", *overrides])


def images(channels: int = 1, size: int = 28, classes: int = 10) -> Any:
    return SimpleNamespace(channels=channels, image_size=size, classes=tuple(map(str, range(classes))))


def test_the_vae_takes_pixels_as_they_are() -> None:
    assert [config(f"model.kind={kind}").data.normalise for kind in ("vae", "mixture")] == [False, True]
    assert config("data.normalise=false").data.normalise is False
    with pytest.raises(ConfigError, match=r"data\.normalise: matters only with model\.kind!=vae"):
        config("model.kind=vae", "data.normalise=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=vmo", "model.kind: 'vmo' is unknown, did you mean 'vmoe'"),
        ("model.gatte=attentive", "model.gatte: unknown key; did you mean model.gate"),
        ("model.num_classes=3", "model.num_classes: unknown key"),
        ("training.epoch=3", "training.epoch: unknown key; did you mean training.epochs"),
        ("training.zero_stage=0", "training.zero_stage: 0 is not supported"),
        ("training.micro_batch=100", "training.micro_batch: must divide training.global_batch=512"),
        ("data.name=mnits", "did you mean 'mnist'"),
        ("data.augmentation=crop", "data.augmentation: unknown"),
        ("data.fraction=0", r"data.fraction: must lie in \(0, 1\]"),
        ("optimizer.name=adagrad", "optimizer.name: expected one of adam, adamw, sgd, rmsprop"),
        ("schedule.kind=constant_cooldown", "schedule.kind: expected one of constant, step, cosine, linear"),
        ("schedule.cooldown_fraction=0.1", "schedule.cooldown_fraction: unknown key"),
        ("init.stage=distil", "init.stage: needs init.weights"),
        ("logging.sample_tokens=3", "logging.sample_tokens: unknown key"),
        ("evaluation.batch=0", "evaluation.batch: must be at least 1"),
    ],
)
def test_impossible_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_experts=1", "model.gate=attentive"], "model: gate: num_experts=1 has no gate"),
        (["training.expert_parallel=2"], "training.expert_parallel: must be 1: model.kind=mixture"),
        (["training.freeze=experts"], "training.freeze: model.kind=mixture has no SMoE layers"),
        (["training.activation_checkpointing=true"], "activation_checkpointing: model.kind=mixture does not recompute"),
        (["training.zero_stage=3"], "training.zero_stage: must be 1 or 2"),
        (["model.kind=vmoe", "training.expert_parallel=3"], "must divide model.moe.num_experts=8"),
        (["model.kind=vmoe", "model.moe.method=vmo"], "vmo"),
        (["model.kind=vmoe", "model.size=cifar/5"], "cifar/4"),
    ],
)
def test_impossible_models_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides).model_config(images())


def test_the_data_decides_sizes_and_steps() -> None:
    made = config("training.epochs=3", "training.global_batch=100", "evaluation.every_epochs=0.5")
    known = made.for_images(1050)
    assert known.training.steps == 32  # 31.5
    assert known.evaluation.every == 6  # 5.25
    assert made.model_config(images(3, 32, 100)).num_classes == 100
    assert config("training.steps=7").for_images(10**6).training.steps == 7
    assert config("evaluation.every_epochs=0").for_images(1000).evaluation.every == 0
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps: must not exceed the run's 7 steps"):
        config("training.steps=7", "schedule.warmup_steps=8").for_images(1000)


def test_resolved_settings_load_again(tmp_path: Path) -> None:
    for kind in VISION_KINDS:
        made = config(f"model.kind={kind}").for_images(1000)
        model_config = made.model_config(images())
        made.model = made.resolved_model(model_config)
        path = tmp_path / f"{kind}.yaml"
        path.write_text(to_yaml(made), encoding="utf-8")
        again = load(VisionRunConfig, path, [])
        assert again == made
        assert again.model_config(images()).to_dict() == model_config.to_dict()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_configurations_load(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(VisionRunConfig, path, [])
    assert capsys.readouterr().err == ""  # nothing in it is without effect
    assert loaded.name == path.stem


def test_every_kind_is_explained() -> None:
    text = explain_kinds()
    for kind in VISION_KINDS:
        assert f"with model.kind={kind}" in text
    assert "model.importance_loss" in text
    assert "model.num_channels" not in text


def schedule(*overrides: str) -> ScheduleConfig:
    return config(*(f"schedule.{override}" for override in overrides)).schedule


def test_step_schedule_falls_after_every_so_many_epochs() -> None:
    falls = schedule("kind=step", "step_epochs=20", "warmup_steps=2")
    assert lr_multiplier(falls, 0, 100, 0) == 0.5
    assert [lr_multiplier(falls, 50, 100, epoch) for epoch in (0, 19, 20, 39, 40)] == pytest.approx(
        [1, 1, 1 / 3, 1 / 3, 1 / 9]
    )


def test_linear_and_constant_schedules() -> None:
    line = schedule("kind=linear", "warmup_steps=1", "min_lr_ratio=0.2")
    assert [lr_multiplier(line, step, 6) for step in range(6)] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])
    assert {lr_multiplier(schedule(), step, 6) for step in range(6)} == {1.0}


def test_a_smaller_set_has_all_classes_though_files_come_class_by_class(tmp_path: Path) -> None:
    shapes = ["data.name=synthetic_strokes", "data.options={train: 40, test: 20}", f"data.dir={tmp_path}"]
    part = config(*shapes, "data.max_train=60", "data.max_test=30").data.open()
    assert (len(part.train), len(part.test)) == (60, 30)
    assert set(part.train.labels.tolist()) == set(part.test.labels.tolist()) == set(range(5))
