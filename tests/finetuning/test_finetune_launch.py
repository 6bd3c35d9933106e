"""`deepspeed launcher/finetune.py` as a user starts it: two processes come to what one does, also after a SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from s2moe import S2MoEForSequenceClassification
from s2moe.finetuning.trainer import newest_checkpoint, step_of
from tests.data.classification_files import glue

from .finetune_jobs import language_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS_AN_EPOCH, EPOCHS = 9, 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small language model, hf/, and a small SST-2, glue/, of 9 x 24 training texts."""
    directory = tmp_path_factory.mktemp("launch")
    language_model(directory / "hf", experts_per_token=4)
    glue(directory / "glue", (240, 60))
    return directory


@pytest.fixture(scope="module")
def whole(files: Path) -> Path:
    """The directory of a run that `deepspeed` started on two processes and nothing interrupted."""
    command = launch(files, "whole")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "sst2: test accuracy" in done.stdout
    return files / "whole" / "sst2"


def launch(files: Path, output: str, processes: int = 2) -> list[str]:
    """The command; on two processes each has half of the experts and of the optimizer's state."""
    overrides = {
        "data.source": files / "glue",
        "data.official": "false",
        "data.input_length": 32,
        "model.checkpoint": files / "hf",
        "model.hidden_dropout": 0.0,  # which each process draws for itself
        "output_dir": files / output,
        "optimizer.lr": 0.003,
        "training.batch": 24,
        "training.micro_batch": 12,
        "training.epochs": EPOCHS,
        "training.evaluation_batch": 6,  # twice that divides both splits: the Trainer's loss counts no text twice
        "training.expert_parallel": processes,
        "training.zero_stage": 1,
        "logging.every": 1,
    }
    script = [str(REPOSITORY / "launcher" / "finetune.py"), "--config", str(REPOSITORY / "configs/finetune/sst2.yaml")]
    settings = [f"{key}={value}" for key, value in overrides.items()]
    if processes == 1:
        return [sys.executable, *script, *settings]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--master_port", str(free_port()), "--num_accelerators", str(processes), *script, *settings]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def environment() -> dict[str, str]:
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return outside | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def figures(run: Path) -> list[dict[str, Any]]:
    """What the run logged of losses, validation and routing."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k == "step" or k.startswith(("train/", "val/", "layer_"))} for e in events]


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def test_it_leaves_what_it_promises(whole: Path) -> None:
    assert results(whole)["steps"] == STEPS_AN_EPOCH * EPOCHS
    assert results(whole)["test_accuracy"] > 0.9
    model, loading = S2MoEForSequenceClassification.from_pretrained(whole / "hf", output_loading_info=True)
    assert not any(loading.values())
    before = load_file(whole.parents[1] / "hf" / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        trained = layer.moe.experts.w1 - before[f"model.layers.{number}.moe.experts.w1"]
        assert (trained.flatten(1).norm(dim=1) > 0).tolist() == [True] * 4  # those of both processes


def test_one_process_comes_to_the_same(files: Path, whole: Path) -> None:
    """`python launcher/finetune.py` with the same batch, in two micro-batches."""
    command = launch(files, "single", processes=1)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    single = files / "single" / "sst2"
    for ours, theirs in zip(figures(whole), figures(single), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            # Rounding may change a token's first expert, or its place in InfoNCE: one of 32 samples is 0.031.
            tolerance = 0.065 if name.startswith("layer_") else 1e-4
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=tolerance), (ours["step"], name)
    assert results(whole)["test_loss"] == pytest.approx(results(single)["test_loss"], rel=1e-3)
    found, expected = (load_file(run / "hf" / "model.safetensors") for run in (whole, single))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_same_command_continues_after_sigkill(files: Path, whole: Path) -> None:
    command = launch(files, "killed")
    run = files / "killed" / "sst2"
    with open(files / "output", "wb") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output, start_new_session=True)
        try:
            while newest_checkpoint(run / "checkpoints") is None:
                assert process.poll() is None, (files / "output").read_text()
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the launcher, and the ranks that it started
            process.wait()
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert step_of(checkpoint) < STEPS_AN_EPOCH * EPOCHS
    assert not (run / "results.json").exists()

    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"step {step_of(checkpoint)}/" not in done.stdout  # it went on from there
    assert results(run) == results(whole)
    assert figures(run) == figures(whole)
    found, expected = (load_file(directory / "hf" / "model.safetensors") for directory in (run, whole))
    assert all(found[name].equal(expected[name]) for name in expected)
