"""The entry points as a user starts them: from any directory, with one clear message for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .jobs import tiny_run

REPOSITORY = Path(__file__).resolve().parents[2]


def start(*arguments: str, cwd: Path, script: str = "pretrain") -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "launcher" / f"{script}.py"), *arguments],
        cwd=cwd,
        env=environment | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def one_message(result: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """The single line of an error; fails if there is more to see."""
    assert result.returncode == status, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_an_unknown_key_is_one_line(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    message = one_message(start("--config", path, *overrides, "training.stepz=3", cwd=tmp_path))
    assert message == "error: training.stepz: unknown key; did you mean training.steps?"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.expert_parallel=2", "error: training.expert_parallel: must divide the number of processes, 1"),
        ("data.dir=nowhere", "error: nowhere is not a prepared corpus; prepare it with: python -m data_prep"),
        ("checkpoint.resume=must", "error: checkpoint.resume=must, but there is no complete checkpoint in "),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    path, overrides = tiny_run(tmp_path)
    assert one_message(start("--config", path, *overrides, override, cwd=tmp_path)).startswith(message)


@pytest.mark.slow
def test_unknown_option_and_missing_file(tmp_path: Path) -> None:
    assert "--confg" in one_message(start("--confg", "x", cwd=tmp_path))
    assert "cannot read the configuration" in one_message(start("--config", "absent.yaml", cwd=tmp_path))


@pytest.mark.slow
def test_help_teaches(tmp_path: Path) -> None:
    result = start("--help", cwd=tmp_path)
    assert result.returncode == 0
    for part in ("--num_accelerators 2 launcher/pretrain.py", "--dry-run", "training.zero_stage = int; default 1"):
        assert part in result.stdout


@pytest.mark.slow
def test_train_then_evaluate_then_export(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    result = start("--config", path, *overrides, "--local_rank=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step 6/6  loss " in result.stderr
    for part in ("valid: ", "bits per byte (600 bytes, every one", "bzip2", "sample:\nThe ", "run directory:"):
        assert part in result.stdout
    run = tmp_path / "runs" / "tiny"
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]

    def evaluate(*arguments: str) -> dict[str, Any]:
        common = ("--checkpoint", str(run), "--data", str(tmp_path / "data"))
        answer = start(*common, *arguments, cwd=tmp_path, script="evaluate")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout.splitlines()[-1])

    same = evaluate("--split", "valid", "--context", "32", "--segment", "32")
    assert same["bpc"] == pytest.approx(last["val/bpc"], rel=1e-5)
    assert same["experts_per_token"] == 1
    more = evaluate("--experts-per-token", "4", "--protocol", "l1-segments")
    assert more["protocol"] == "l1-segments"
    assert more["symbols"] == 10 * 39
    report = evaluate("--report", "collapse", "--probe-tokens", "128", "--context", "32", "--segment", "32")
    assert {Path(name).name for name in report["files"]} == {
        "collapse.json",
        *(f"{part}.png" for part in ("coselection", "load", "similarity", "slimmability", "spectrum")),
    }
    assert all((run / "collapse" / Path(name).name).is_file() for name in report["files"])
    assert report["bpc"]["1"] == pytest.approx(last["val/bpc"], rel=1e-5)
    error = start("--checkpoint", str(tmp_path), "--data", str(tmp_path / "data"), cwd=tmp_path, script="evaluate")
    assert "no weights in" in one_message(error)

    exported = start(
        "--checkpoint",
        str(run / "checkpoints" / "step-00000004"),
        "--out",
        str(tmp_path / "hf"),
        cwd=tmp_path,
        script="export",
    )
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "hf" / "training.json").read_text())["step"] == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mistake_is_said_once_under_two_processes(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    result = subprocess.run(
        [
            str(Path(sys.executable).parent / "torchrun"),
            "--standalone",
            "--nproc-per-node",
            "2",
            str(REPOSITORY / "launcher" / "pretrain.py"),
            "--config",
            path,
            *overrides,
            "data.dir=nowhere",
        ],
        cwd=tmp_path,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode != 0
    assert result.stderr.count("error: nowhere is not a prepared corpus") == 1
