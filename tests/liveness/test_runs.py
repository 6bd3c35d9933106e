"""Every setting of a run that is not its model's does something: in what DeepSpeed gets, or in a tiny whole run."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.config.vision import VisionRunConfig
from s2moe.training.engine import deepspeed_config, make_optimizer
from s2moe.training.schedule import lr_multiplier
from tests.distributed_harness import run_distributed

from .cases import context, leaves, others
from .runs import observe_all

PLAIN: dict[str, tuple[Any, list[str]]] = {
    "text": (RunConfig, ["name=x", "data.dir=x", "training.steps=20", "training.global_batch=4"]),
    "vision": (VisionRunConfig, ["name=x", "training.steps=20", "training.global_batch=4"]),
}
TEXT_ONLY = ["training.sequence_length=8", "model.hidden_size=16", "model.num_attention_heads=2"]
PLANNED = ("optimizer.", "schedule.", "training.zero_stage", "training.offload_optimizer", "training.micro_batch")
CONTEXTS = {
    "optimizer.name": ["optimizer.weight_decay=0.1"],
    "schedule.step_epochs": ["schedule.step_epochs=1"],
    "schedule.step_factor": ["schedule.step_epochs=1"],
    "vision schedule.kind": ["schedule.kind=cosine"],
}
VALUES: dict[str, list[Any]] = {
    "optimizer.betas": [[0.5, 0.99], [0.9, 0.5]],
    "schedule.kind": ["constant_cooldown"],
    "vision schedule.kind": ["constant", "linear"],
    "schedule.warmup_steps": [3],
    "schedule.step_epochs": [2],
    "optimizer.clip": [0.3],
    "training.zero_stage": [2, 3],
}

DIGITS = ["model.architecture=digits"]
VMOE = ["model.kind=vmoe", "model.size=digits/2", "model.moe.num_experts=4"]

Cases = list[tuple[list[str], str]]
IN_RUNS: dict[str, Cases] = {  # (the settings under which it matters, the other value)
    "text": [
        ([], "seed=2"),
        ([], "data.train=valid"),
        ([], "data.validation=test"),
        ([], "training.steps=3"),
        ([], "training.global_batch=8"),
        ([], "training.sequence_length=8"),
        ([], "training.precision=bf16"),
        ([], "training.freeze=experts"),
        ([], "training.activation_checkpointing=true"),
        ([], "training.compile=true"),
        ([], "training.stop_after_minutes=1e-9"),
        ([], "evaluation.every=1"),
        ([], "evaluation.context=4"),
        ([], "evaluation.segment=4"),
        ([], "evaluation.batch=3"),
        (["evaluation.every=1"], "evaluation.max_symbols=50"),
        ([], "probe.every=1"),
        (["probe.every=1", "probe.tokens=64"], "probe.tokens=32"),
        (["probe.every=1", "probe.tokens=64", "probe.samples=16"], "probe.samples=8"),
        ([], "checkpoint.every=1"),
        (["checkpoint.every=1"], "checkpoint.keep=1"),
        ([], "checkpoint.asynchronous=true"),
        (["training.steps=3"], "logging.every=3"),
        ([], "logging.tensorboard=true"),
        (["logging.tensorboard=true"], "logging.images_every=1"),
        ([], "profile.steps=2"),
        ([], "profile.layers_every=1"),
    ],
    "vision": [
        (DIGITS, "seed=2"),
        (DIGITS, "data.augmentation=flip_crop"),
        (DIGITS, "data.normalise=false"),
        (DIGITS, "data.fraction=0.3"),
        (DIGITS, "data.max_train=64"),
        (DIGITS, "data.max_test=20"),
        (DIGITS, "optimizer.name=sgd"),
        (DIGITS, "optimizer.name=rmsprop"),
        (DIGITS, "evaluation.every=1"),
        (DIGITS, "evaluation.batch=7"),
        (DIGITS, "training.global_batch=8"),
        (DIGITS, "training.steps=3"),
        (DIGITS, "training.precision=bf16"),
        (VMOE, "training.freeze=experts"),
        (VMOE, "training.activation_checkpointing=true"),
    ],
}
ELSEWHERE: dict[str, str] = {  # the test that looks at a key
    "name": "the run directory, tests/training/test_run.py",
    "output_dir": "likewise",
    "data.dir": "the corpus of all runs here",
    "data.prepare": "tests/config/test_run_config.py",
    "data.name": "tests/data/test_images_files.py",
    "data.source": "tests/data/test_images_files.py",
    "data.options": "tests/data/test_images_files.py",
    "training.sequence_parallel": "tests/distributed/test_parallel_shapes.py",
    "training.expert_parallel": "tests/distributed/test_parallel_shapes.py",
    "training.timeout_minutes": "tests/training/test_watchdog.py",
    "training.epochs": "tests/config/test_vision_config.py",
    "evaluation.every_epochs": "tests/config/test_vision_config.py",
    "init.weights": "tests/training/test_initial.py",
    "init.noise": "tests/training/test_initial.py",
    "init.stage": "tests/models/vision/test_mixture_stages.py",
    "checkpoint.resume": "tests/training/test_run.py",
    "logging.sample_prompt": "tests/training/test_report.py",
    "logging.sample_tokens": "tests/training/test_report.py",
}


def settings_of(kind: str) -> tuple[Any, list[str]]:
    cls, base = PLAIN[kind]
    return cls, [*base, *(TEXT_ONLY if kind == "text" else [])]


def plan_of(kind: str, overrides: list[str]) -> str:
    """Optimizer, learning rates and DeepSpeed's configuration of the settings."""
    cls, base = settings_of(kind)
    config: Any = load(cls, None, [*base, *overrides])
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = make_optimizer(model, config.optimizer)
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    rates = [lr_multiplier(config.schedule, step, 20, step // 4) for step in range(20)]
    return repr((type(optimizer).__name__, groups, rates, deepspeed_config(config, 1)))


def planned_cases() -> list[Any]:
    found = []
    for kind in PLAIN:
        cls, base = settings_of(kind)
        settings = load(cls, None, base).described()
        for path, known in leaves(settings.section):
            key = ".".join(path)
            if not key.startswith(PLANNED):
                continue
            where = [f"{name}={json.dumps(value)}" for name, value in context(settings, path).items()]
            where += CONTEXTS.get(f"{kind} {key}", CONTEXTS.get(key, []))
            for value in VALUES.get(f"{kind} {key}", VALUES.get(key, others(known))):
                found.append(pytest.param(kind, where, f"{key}={json.dumps(value)}", id=f"{kind} {key}={value}"))
    return found


@functools.cache
def looked_at(kind: str) -> set[str]:
    return {other.partition("=")[0] for _, other in IN_RUNS[kind]}


@pytest.mark.parametrize(("kind", "where", "override"), planned_cases())
def test_a_setting_changes_the_optimizer_the_schedule_or_the_engine(kind: str, where: list[str], override: str) -> None:
    assert plan_of(kind, [*where, override]) != plan_of(kind, where)


@pytest.mark.parametrize("kind", PLAIN)
def test_every_setting_of_a_run_is_looked_at(kind: str) -> None:
    cls, base = settings_of(kind)
    for path, _ in leaves(load(cls, None, base).described().section):
        key = ".".join(path)
        assert (
            key.startswith(("model.", *PLANNED))
            or key in looked_at(kind)
            or key in looked_at("text" if not key.startswith("data.") else kind)
            or key in ELSEWHERE
        ), f"{key}: give another value in IN_RUNS, or say in ELSEWHERE which test looks at it"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", PLAIN)
def test_a_setting_changes_a_run(kind: str) -> None:
    cases = IN_RUNS[kind]
    jobs = {json.dumps(where): where for where, _ in cases}
    jobs |= {json.dumps([*where, other]): [*where, other] for where, other in cases}
    found = run_distributed(observe_all, 1, kind, jobs, timeout=600)[0]
    dead = [other for where, other in cases if found[json.dumps(where)] == found[json.dumps([*where, other])]]
    assert not dead


def test_vision_has_the_optimizer_that_is_asked_for() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    for name, cls in (
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
    ):
        config = load(VisionRunConfig, None, ["name=x", f"optimizer.name={name}", "optimizer.weight_decay=0.1"])
        assert type(make_optimizer(model, config.optimizer)) is cls
    assert len(make_optimizer(model, config.optimizer).param_groups) == 1  # decayed=all


def test_a_cool_down_of_one_step_is_the_last() -> None:
    config = load(RunConfig, None, [*settings_of("text")[1], "schedule.kind=constant_cooldown"])
    rates = [lr_multiplier(config.schedule, step, 4) for step in range(4)]  # a fifth of four steps
    assert rates == [1.0, 1.0, 1.0, config.schedule.min_lr_ratio]
