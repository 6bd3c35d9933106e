"""The Trainer's script in docs/finetuning.md runs, and the settings that the page names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from launcher import finetune
from s2moe.config import load
from s2moe.config.finetune import FinetuneConfig
from s2moe.config.run import RunConfig
from tests.pages import blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")


def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = [block for block in blocks("docs/finetuning.md") if "S2MoETrainer(" in block]
    found: dict[str, object] = {}
    exec(compile(source, "docs/finetuning.md", "exec"), found)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert model.score.weight.equal(found["model"].score.weight)
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def test_named_settings_exist() -> None:
    named = re.findall(r"(?:model|data|training|optimizer)\.[a-z_.]+=[a-z_0-9.]+", PAGE)
    named = [setting for setting in named if not setting.startswith("data.source")]
    assert len(named) > 8
    for setting in named:
        task, more = ("own", ["data.source=x"]) if "_column=" in setting else ("sst2", [])
        load(FinetuneConfig, ROOT / "configs" / "finetune" / f"{task}.yaml", [setting, *more])


def test_the_first_command_of_the_help_fits_its_model() -> None:
    """The quickstart's model, which is pre-trained on shorter texts than the published recipe's."""
    assert finetune.__doc__ is not None
    command = re.search(r"deepspeed (launcher/finetune.py .*\\\n.*)\n", finetune.__doc__)
    assert command is not None
    _, _, config, *overrides = command[1].replace("\\\n", " ").split()
    assert "model.checkpoint=runs/quickstart" in overrides
    most = load(RunConfig, ROOT / "configs" / "quickstart.yaml").training.sequence_length
    assert load(FinetuneConfig, ROOT / config, overrides).data.input_length <= most
