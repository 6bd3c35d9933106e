"""Fine-tuning runs, from a configuration to the test accuracy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline

from launcher.finetune import main as launcher
from s2moe import S2MoEConfig, S2MoEForSequenceClassification
from s2moe.config import ConfigError, load
from s2moe.config.finetune import FinetuneConfig
from s2moe.data.classification import load_classification
from s2moe.data.encoding import encode_text, expressible
from s2moe.data.tokenizers import TEXT8_ALPHABET, CharacterTokenizer
from s2moe.training.run_directory import PRETRAINING, sign
from s2moe.training.run_lock import locked
from tests.data.classification_files import glue, treebank
from tests.distributed_harness import run_distributed
from tests.training.jobs import contents
from tests.training.lock_jobs import ALONE

from .finetune_jobs import language_model, run

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs" / "finetune"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small language model, hf/, and a small SST-2 in GLUE's format, glue/."""
    directory = tmp_path_factory.mktemp("finetune")
    language_model(directory / "hf")
    glue(directory / "glue", (240, 60))
    return directory


def settings(files: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "data.source": files / "glue",
        "data.official": False,
        "data.input_length": 32,
        "model.checkpoint": files / "hf",
        "output_dir": output,
        "optimizer.lr": 0.01,
        "training.epochs": 3,
        "logging.every": 5,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


@pytest.mark.parametrize("name", ["sst2", "sst5", "imdb", "banking77"])
def test_the_configurations_are_the_published_recipe(name: str) -> None:
    config = load(FinetuneConfig, CONFIGS / f"{name}.yaml")
    assert (config.name, config.data.task, config.data.input_length) == (name, name, 512)
    assert config.training.batch == (4 if name == "imdb" else 16)
    assert config.training.epochs == (50 if name == "banking77" else 5)
    assert (config.optimizer.lr, config.model.balance_loss) == (1e-4, 0.0)


def test_changes_of_the_model() -> None:
    config = load(FinetuneConfig, CONFIGS / "sst2.yaml", ["model.noise=false", "model.hidden_dropout=0.1"])
    changes = config.model_changes({"name": "topk", "balance_loss": 0.01}, ("no", "yes"))
    assert changes["moe"] == {"router": {"balance_loss": 0.0}, "stochastic": {"enabled": False}}
    assert S2MoEConfig(**changes).num_labels == 2
    assert changes["hidden_dropout"] == 0.1
    assert config.model_changes({"name": "base"}, ("no", "yes"))["moe"] == {"stochastic": {"enabled": False}}
    config = load(FinetuneConfig, CONFIGS / "sst2.yaml", ["model.balance_loss=0.1"])
    with pytest.raises(ConfigError, match="'base' has none"):
        config.model_changes({"name": "base"}, ("no", "yes"))


@pytest.mark.distributed
def test_a_run_and_its_continuation(files: Path, tmp_path: Path) -> None:
    """Two ranks, expert parallel 2: it learns, leaves what it promises, and an interrupted one ends the same."""
    spread = {"training__expert_parallel": 2, "checkpoint__keep": 5}
    chosen = settings(files, tmp_path / "whole", **spread)
    whole = run_distributed(run, 2, str(CONFIGS / "sst2.yaml"), chosen)[0]
    assert whole["results"]["test_accuracy"] > 0.9
    directory = tmp_path / "whole" / "sst2"
    assert json.loads((directory / "results.json").read_text()) == whole["results"]
    assert whole["results"]["texts"] == {"train": 216, "validation": 24, "test": 60}
    events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    validated = {event["step"]: event["val/accuracy"] for event in events if "val/accuracy" in event}
    assert len(validated) == 3
    assert whole["results"]["validation_accuracy"] == max(validated.values())
    assert validated[whole["results"]["best_step"]] == max(validated.values())
    trained = [event for event in events if "train/loss" in event]
    for event in trained:
        assert event["train/loss"] == pytest.approx(event["train/task_loss"] + event["train/aux_loss"], rel=1e-4)
        assert {"layer_0/load_entropy", "layer_1/infonce_loss", "lr", "grad_norm"} <= event.keys()
    model = S2MoEForSequenceClassification.from_pretrained(directory / "hf")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.model.layers[0].moe.experts.w1.shape[0] == 4
    assert list((directory / "tensorboard").iterdir())

    found = AutoTokenizer.from_pretrained(directory / "hf")
    assert len(found) == 256
    classify = pipeline("text-classification", model=model, tokenizer=found)
    text = "a fine film"
    logits = model(input_ids=torch.tensor([list(text.encode())])).logits
    assert classify(text)[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    card = (directory / "hf" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert f"| Test accuracy | {100 * whole['results']['test_accuracy']:.2f} %" in card
    assert f"| Fine-tuned from | {files.name} |" in card
    assert not [place for place in (str(files), str(tmp_path)) if place in card]

    chosen = settings(files, tmp_path / "stopped", **spread)
    stopped = run_distributed(run, 2, str(CONFIGS / "sst2.yaml"), chosen, 20)[0]
    assert stopped == {"step": 20, "results": {}}
    again = run_distributed(run, 2, str(CONFIGS / "sst2.yaml"), chosen)[0]
    assert again["results"] == whole["results"]
    for name, value in load_file(tmp_path / "stopped" / "sst2" / "hf" / "model.safetensors").items():
        assert value.equal(model.state_dict()[name]), name

    assert not (directory / "hf" / "training_args.bin").exists()  # a pickle, with the paths of this machine
    finished = contents(directory)
    free = {**settings(files, tmp_path / "whole", **spread), "checkpoint.keep": 1, "logging.every": 1}  # to be changed
    assert run_distributed(run, 2, str(CONFIGS / "sst2.yaml"), free)[0] == {"step": 42, "results": whole["results"]}
    changed = {**chosen, "optimizer.lr": 0.02}
    refused = run_distributed(run, 2, str(CONFIGS / "sst2.yaml"), changed)[0]
    assert "optimizer.lr was 0.01, is 0.02" in refused["error"]
    assert contents(directory) == finished


@pytest.mark.distributed
def moved(files: Path, output: Path) -> set[str]:
    """Which of an expert, a router and the embedding fine-tuning has changed."""
    before, after = (
        load_file(files / "hf" / "model.safetensors"),
        load_file(output / "sst2" / "hf" / "model.safetensors"),
    )
    names = ("model.embed_tokens.weight", "model.layers.0.moe.experts.w1", "model.layers.1.moe.router.scores.weight")
    return {name for name in names if not after[name].equal(before[name].to(after[name].dtype))}


def test_one_checkpoint_is_kept_beside_the_best_and_a_run_without_them_is_finished(files: Path, tmp_path: Path) -> None:
    """By the default of checkpoint.keep; stopped in the second epoch, it goes on from there. What is frozen stays."""
    chosen = settings(files, tmp_path, model__freeze="routers_and_experts")
    folder = tmp_path / "sst2" / "checkpoints"
    assert run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), chosen, 20)[0]["step"] == 20
    assert {path.name for path in folder.iterdir()} == {"checkpoint-14", "checkpoint-20"}
    results = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), chosen)[0]["results"]
    assert {path.name for path in folder.iterdir()} == {f"checkpoint-{results['best_step']}", "checkpoint-42"}
    assert moved(files, tmp_path) == {"model.embed_tokens.weight"}
    shutil.rmtree(folder)  # to save disk
    finished = contents(tmp_path / "sst2")
    assert run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), chosen)[0]["results"] == results
    assert contents(tmp_path / "sst2") == finished


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen = settings(files, tmp_path / "runs", training__expert_parallel=2)
    command = ["--config", str(CONFIGS / "sst2.yaml"), *(f"{key}={value}" for key, value in chosen.items())]
    launcher([*command, "--dry-run"])
    said = capsys.readouterr().out
    classifier = S2MoEForSequenceClassification(S2MoEConfig.from_pretrained(files / "hf", num_labels=2))
    for part in (
        "sst2: 216 train, 24 validation, 60 test",
        f"{sum(parameter.numel() for parameter in classifier.parameters()):,} parameters",
        "42 steps, 14 in each of 3 epochs, in batches of 16 texts: 2 processes x micro-batches of 8",
        str(tmp_path / "runs" / "sst2"),
    ):
        assert part in said
    launcher([*command, "data.source=null", f"data.downloads={tmp_path / 'data'}", "--dry-run"])
    assert f"a run downloads SST-2.zip to {tmp_path / 'data' / 'sst2'} first" in capsys.readouterr().out
    for wrong, message in (
        ("training.batch=3", "training.batch: must be a multiple"),
        ("data.input_length=65", "give data.input_length=64"),
        ("model.checkpoint=absent", "no weights in absent"),
        (f"output_dir={files.parent}", ""),
    ):
        if not message:
            (files.parent / "sst2").mkdir()
            (files.parent / "sst2" / "hf").write_text("somebody's")
            message = "nothing says that a run made it"
        with pytest.raises(ConfigError, match=message):
            launcher([*command, wrong, "--dry-run"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_classifier_of_characters_reads_texts_as_its_run_did(files: Path, tmp_path: Path) -> None:
    """Its pipeline takes any text, as the model card's example does, and comes to the run's test accuracy."""
    base = CharacterTokenizer(TEXT8_ALPHABET)
    language_model(tmp_path / "hf", base)
    chosen = settings(files, tmp_path, model__checkpoint=tmp_path / "hf", data__keep="last", data__input_length=48)
    chosen["training.epochs"] = 1
    results = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), chosen)[0]["results"]
    directory = tmp_path / "sst2" / "hf"
    model = S2MoEForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert classify("A fine film.", truncation=True)

    test = load_classification("sst2", files / "glue", official=False).test
    assert any(len(expressible(base, text)) > 48 for text in test.texts)
    for text in test.texts:
        assert tokenizer(text, truncation=True)["input_ids"] == encode_text(base, text, 48, "last").tolist()
    found = [answer["label"] for answer in classify(test.texts, truncation=True)]
    right = [model.config.label2id[name] == label for name, label in zip(found, test.labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(results["test_accuracy"])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.input_length": 4096}, "at most 64 tokens, got 4096: give data.input_length=64"),
        pytest.param({"data.official": True}, "has 67,349 / 872 texts", marks=pytest.mark.slow),
        ({"training.batch": 3, "training.micro_batch": 2}, "training.batch: must be a multiple"),
        pytest.param({"model.checkpoint": "absent"}, "no weights in absent", marks=pytest.mark.slow),
        pytest.param({"checkpoint.resume": "must"}, "checkpoint.resume=must, but", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_told(files: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    found = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), {**settings(files, tmp_path), **changes})[0]
    assert message in found["error"]


@pytest.mark.distributed
def test_what_another_start_or_another_run_has_is_left_alone(files: Path, tmp_path: Path) -> None:
    """Also the pre-trained run itself, as whose continuation the fine-tuning is named."""
    chosen = settings(files, tmp_path)
    with locked(tmp_path / "sst2", ALONE):
        found = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), chosen)[0]
    assert "sst2 is in use by another start of this run: process" in found["error"]
    base = tmp_path / "sst2"
    shutil.copytree(files / "hf", base / "hf")
    sign(base, PRETRAINING, "sst2")
    before = contents(base)
    found = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), {**chosen, "model.checkpoint": base})[0]
    assert "sst2 is of a pre-training run, 'sst2', and this is a fine-tuning run: choose another name" in found["error"]
    assert contents(base) == before


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("shape", [("bf16", 1), ("fp32", 3), ("bf16", 3)])
def test_precisions_and_stages(files: Path, tmp_path: Path, shape: tuple[str, int]) -> None:
    chosen = settings(files, tmp_path, training__expert_parallel=2, training__precision=shape[0])
    chosen["training.zero_stage"] = shape[1]
    chosen["model.freeze"] = "routers_and_experts"
    chosen["training.epochs"] = 6
    found = run_distributed(run, 2, str(CONFIGS / "sst2.yaml"), chosen)[0]
    assert found["results"]["test_accuracy"] > 0.8
    assert moved(files, tmp_path) == {"model.embed_tokens.weight"}


@pytest.mark.slow
def test_the_launcher(files: Path, tmp_path: Path) -> None:
    treebank(tmp_path / "trees", (60, 20, 20))
    chosen = {
        **settings(files, tmp_path / "runs", data__source=tmp_path / "trees"),
        "training.epochs": 1,
        "data.max_texts": 16,
    }
    command = [sys.executable, str(REPOSITORY / "launcher" / "finetune.py"), "--config", str(CONFIGS / "sst5.yaml")]
    overrides = [f"{key}={value}" for key, value in chosen.items()]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *overrides, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    done = start()
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "sst5" / "results.json").read_text())
    assert f"sst5: test accuracy {100 * results['test_accuracy']:.2f} % (16 texts)" in done.stdout
    assert "a subset: at most 16 texts of each split" in done.stdout
    wrong = start("optimizer.lrr=1")
    assert wrong.returncode == 2
    assert "error: optimizer.lrr: unknown key; did you mean optimizer.lr?" in wrong.stderr
    assert "data.input_length = int; default 512" in start("--help").stdout
