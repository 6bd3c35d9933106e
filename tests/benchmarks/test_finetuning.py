"""The fine-tuning campaign: what it runs, that it goes on where it stopped, and the table."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import finetuning
from s2moe import S2MoEConfig
from s2moe.config import load
from s2moe.config.finetune import FinetuneConfig
from s2moe.config.run import RunConfig
from s2moe.models.sizes import model_sizes
from tests.data.classification_files import treebank
from tests.training.jobs import tiny_corpus

# Stands in for both launchers: leaves what a finished run leaves, or waits, or fails, by the name of the run.
FAKE = """
import json, os, pathlib, signal, sys, time
settings = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
run = pathlib.Path(settings["output_dir"]) / settings["name"]
run.mkdir(parents=True, exist_ok=True)
with open(run / "starts", "a") as file:
    file.write("x")
if settings["name"] in os.environ.get("FAIL", "").split(","):
    sys.exit(3)
if settings["name"] == os.environ.get("WAIT"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run / "pid").write_text(str(os.getpid()))
    (run / "pid").rename(run / "waiting")
    time.sleep(60)
if settings["name"].startswith("pretrain"):
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text(pathlib.Path(os.environ["MODEL"]).read_text())
    events = [{"step": 5, "train/loss": 1.0, "tokens": 640}, {"step": 5, "val/bpc": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + chr(10) for event in events))
else:
    accuracy = 0.5 + 0.1 * int(settings["seed"])
    texts = {"train": 10, "validation": 2, "test": 3}
    answer = {"test_accuracy": accuracy, "texts": texts, "steps": 7, "notes": ["made up"], "method": "topk"}
    (run / "results.json").write_text(json.dumps(answer))
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line whose runs are the stand-in's."""
    fake, model = tmp_path / "fake.py", tmp_path / "model"
    fake.write_text(FAKE)
    S2MoEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(model)
    monkeypatch.setenv("MODEL", str(model / "config.json"))
    launch = shlex.join([sys.executable, str(fake)])
    return ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--launch", launch, "--tasks", "sst2"]


def starts(out: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in out.glob("*/starts")}


def test_models_differ_in_the_method_alone_and_cost_the_same(tmp_path: Path) -> None:
    for budget in finetuning.BUDGETS:
        options = finetuning.parse(["--data", "d", "--out", str(tmp_path), "--budget", budget])
        configs = {}
        for method in options.methods:
            run = finetuning.pretraining(options, method)
            configs[method] = load(RunConfig, run.arguments[1], run.arguments[2:])
            configs[method].micro_batch(1)
        sizes = {method: model_sizes(config.model_config(256)) for method, config in configs.items()}
        assert sizes["smoe"].macs_per_token == pytest.approx(sizes["dense"].macs_per_token, rel=0.02)
        assert sizes["xmoe"].macs_per_token == pytest.approx(sizes["dense"].macs_per_token, rel=0.04)
        assert sizes["s2moe"].training_macs_per_token == pytest.approx(sizes["dense"].macs_per_token, rel=0.04)
        assert sizes["s2moe"].macs_per_token < sizes["smoe"].macs_per_token
        assert sizes["dense"].experts == 0
        for config in configs.values():
            assert config.training == configs["smoe"].training
            assert config.optimizer == configs["smoe"].optimizer
        for task in finetuning.TASKS:
            run = finetuning.finetuning(options, task, "smoe", 2)
            tuned = load(FinetuneConfig, run.arguments[1], run.arguments[2:])
            assert (tuned.data.task, tuned.seed, tuned.directory) == (task, 2, tmp_path / f"{task}-smoe-seed2")
            assert tuned.model.checkpoint == str(tmp_path / "pretrain-smoe" / "hf")
            if budget == "papers":
                assert tuned.optimizer.lr == 1e-4


def test_a_campaign_and_its_extension(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words += ["--pretrain", "seed=5"]
    assert finetuning.main([*words, "--seeds", "1,2", "--methods", "smoe,dense"]) == 0
    content = json.loads((out / "results.json").read_text())
    assert content["summary"]["smoe"]["sst2"]["mean"] == pytest.approx(0.65)
    assert content["summary"]["smoe"]["sst2"]["sd"] == pytest.approx(0.1 / 2**0.5)
    assert {row["method"] for row in content["finetuned"]} == {"smoe", "dense"}  # not the router's name
    assert content["pretrained"][0]["bpc"] == 2.5
    assert len(content["commands"]) == 6
    assert {"torch", "device", "date"} <= content["header"].keys()
    table = (out / "results.md").read_text()
    assert "| 2.500 | 65.0 ± 7.1 |" in table
    assert "| published: smoe | 63 | 1.12 | 81.5 |" in table
    assert re.search("Pre-training: 640 tokens of .*, seed 5; ", table)
    assert "sst2: 10 / 2 / 3 texts, 7 steps" in table
    before = starts(out)
    assert set(before.values()) == {1}
    assert finetuning.main([*words, "--seeds", "1,2,3", "--methods", "smoe"]) == 0
    assert starts(out) == before | {"sst2-smoe-seed3": 1}
    with pytest.raises(SystemExit, match=r"begun with other settings: finetune was \[\], is \['training.epochs=9'\]"):
        finetuning.main([*words, "--finetune", "training.epochs=9"])


def test_a_run_that_fails_is_told_and_tried_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAIL", "pretrain-smoe,sst2-xmoe-seed1")
    assert finetuning.main([*words, "--seeds", "1,2", "--methods", "smoe,xmoe"]) == 1
    assert "error: 2 runs failed: pretrain-smoe, sst2-xmoe-seed1" in capsys.readouterr().err
    assert "sst2-smoe-seed1" not in starts(out)  # there is nothing to fine-tune
    assert "70.0 (1 of 2 seeds)" in (out / "results.md").read_text()
    monkeypatch.delenv("FAIL")
    assert finetuning.main([*words, "--seeds", "1,2", "--methods", "smoe,xmoe"]) == 0
    assert starts(out)["sst2-xmoe-seed2"] == 1
    assert starts(out)["sst2-xmoe-seed1"] == 2


def is_alive(pid: int) -> bool:
    """Whether a process, of whomever, still has its files open."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """A killed campaign's run lives on, so no second campaign starts beside it."""
    out = tmp_path / "out"
    words = [*words, "--seeds", "1", "--methods", "smoe"]
    script = str(Path(finetuning.__file__))
    process = subprocess.Popen([sys.executable, script, *words], env=os.environ | {"WAIT": "sst2-smoe-seed1"})
    waiting = out / "sst2-smoe-seed1" / "waiting"
    deadline = time.monotonic() + 120
    while not waiting.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(60) == (finetuning.STOPPED if how == signal.SIGTERM else -how)
    if how == signal.SIGKILL:
        with pytest.raises(SystemExit, match="another campaign, or a run of it, is at work"):
            finetuning.main(words)
        pid = int(waiting.read_text())
        os.kill(pid, signal.SIGKILL)
        while is_alive(pid):  # its lock goes with it
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert finetuning.main(words) == 0
    assert starts(out) == {"pretrain-smoe": 1, "sst2-smoe-seed1": 2}


def test_wrong_words_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--methods", "smoe,swich"], "--methods: unknown swich; known: smoe, s2moe, xmoe, dense"),
        (["--tasks", "sst3"], "--tasks: unknown sst3"),
        (["--seeds", "one"], "--seeds: expected whole numbers"),
        (["--source", "sst2"], "--source: expected TASK=PATH"),
    ):
        with pytest.raises(SystemExit):
            finetuning.parse([*words, *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_launchers(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "data")
    treebank(tmp_path / "trees", (60, 20, 20))
    pretrain = ["training.steps=4", "schedule.warmup_steps=1", "training.global_batch=2", "training.micro_batch=2"]
    arguments: list[Any] = [
        *("--data", tmp_path / "data", "--out", tmp_path / "out", "--source", f"sst2={tmp_path / 'trees'}"),
        *("--tasks", "sst2", "--seeds", "1", "--pretrain", *pretrain, "training.sequence_length=128"),
        *("--finetune", "data.official=false", "training.epochs=1", "data.input_length=128"),
    ]
    assert finetuning.main([str(word) for word in arguments]) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["method"] for row in content["finetuned"]} == {"smoe", "s2moe", "xmoe", "dense"}
    assert all(0 <= row["test_accuracy"] <= 1 for row in content["finetuned"])
    assert all(4 < model["bpc"] < 12 for model in content["pretrained"])
