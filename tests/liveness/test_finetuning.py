"""Every setting of fine-tuning reaches what trains: its arguments, the model, the learning rates."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch

from s2moe.config import ConfigError, load
from s2moe.config.finetune import FinetuneConfig
from s2moe.config.options import dataclass_section
from s2moe.config.relevance import Settings
from s2moe.finetuning import run
from s2moe.training.processes import Processes

from .cases import context, leaves, others

BASE = ["name=x", "data.task=sst2", "model.checkpoint=x"]
VALUES: dict[str, list[Any]] = {
    "optimizer.betas": [[0.5, 0.999], [0.9, 0.5]],
    "training.batch": [32],
    "training.micro_batch": [4],
    "training.precision": ["bf16"],
    "training.zero_stage": [2, 3],
    "model.balance_loss": [0.3, None],
    "model.hidden_dropout": [0.3],
}
ELSEWHERE = {  # the test that looks at a key
    "name": "tests/finetuning/test_finetune.py",
    "output_dir": "tests/finetuning/test_finetune.py",
    "data.": "tests/finetuning/test_finetune.py, tests/data/test_classification.py",
    "model.checkpoint": "tests/finetuning/test_finetune.py",
    "model.freeze": "tests/finetuning/test_trainer.py",
    "training.expert_parallel": "tests/finetuning/test_trainer_parallel.py",
    "training.timeout_minutes": "tests/training/test_processes.py",
    "checkpoint.": "tests/finetuning/test_finetune.py",
}


def reaches(overrides: list[str]) -> str:
    """What the settings become."""
    config = load(FinetuneConfig, None, [*BASE, *overrides])
    processes = Processes(0, 0, 1, torch.device("cpu"))
    with mock.patch.object(run, "TrainingArguments", dict), mock.patch.object(run, "cpu_processes", dict):
        arguments = run.training_arguments(config, processes, config.micro_batch(1))
    factor = config.optimizer.factors.factors(3)
    factors = [factor(name) for name in ("score.weight", "model.layers.0.x", "model.embed_tokens.weight")]
    changes = config.model_changes({"name": "topk", "balance_loss": 0.01}, ("no", "yes"))
    return repr((arguments, factors, changes))


def cases() -> list[Any]:
    """(context, another value) of each setting."""
    section = dataclass_section(FinetuneConfig)
    settings = Settings.of(load(FinetuneConfig, None, BASE), section)
    found = []
    for path, known in leaves(section):
        key = ".".join(path)
        if any(key == name or (name.endswith(".") and key.startswith(name)) for name in ELSEWHERE):
            continue
        where = [f"{name}={json.dumps(value)}" for name, value in context(settings, path).items()]
        values = VALUES.get(key, others(known))
        assert values, f"{key}: give another value in VALUES, or say in ELSEWHERE which test looks at it"
        found += [pytest.param(where, f"{key}={json.dumps(value)}", id=f"{key}={value}") for value in values]
    return found


@pytest.mark.parametrize(("where", "override"), cases())
def test_a_setting_of_fine_tuning_reaches_what_trains(where: list[str], override: str) -> None:
    assert reaches([*where, override]) != reaches(where)


@pytest.mark.parametrize(
    "override", ["model.balance_loss=0.1", "model.freeze=experts", "model.noise=false", "training.expert_parallel=2"]
)
def test_settings_of_experts_are_refused_for_a_dense_model(override: str) -> None:
    config = load(FinetuneConfig, None, [*BASE, override])
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}: the model has no SMoE layers"):
        config.check_dense(0)
    config.check_dense(1)
