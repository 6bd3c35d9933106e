"""launcher/train_vision.py as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import common, train_vision

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = "configs/vision/digits_quick.yaml"


class Ended(Exception):
    """In the place of the end of the process."""


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The entry point in this process; an error raises Ended with its status."""

    def leave(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(common, "leave", leave)
    monkeypatch.chdir(REPOSITORY)
    with common.user_errors():
        train_vision.main(list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing; for example --config configs/vision/digits_quick.yaml"),
        (["--config", QUICK, "model.gatte=attentive"], "model.gatte: unknown key; did you mean model.gate?"),
        (["--config", QUICK, "--epochs", "3"], "--epochs goes with --table"),
        (["--config", QUICK, "--source", "x"], "--source goes with --table or --report"),
        (["--table", "mnist", "--samples", "5"], "--samples goes with --report"),
        (["--report", "runs/x", "--config", QUICK], "--report goes without --config and --table"),
        (["--report", "runs/x", "seed=2"], "--report takes no seed=2"),
        (["--report", "runs/x", "--dry-run"], "--report takes no --dry-run"),
        (["--report", "runs/x", "--corrupt-seed", "-1"], "--corrupt-seed: must be at least 0, got -1"),
        (["--report", "/nowhere"], "/nowhere is no finished vision run: it has no config.yaml"),
        (["--config", QUICK, "--table", "mnist"], "--table and --config exclude one another"),
        (["--config", QUICK, "--dryrun"], "unrecognized arguments: --dryrun"),
        (["--table", "mnits"], "there is no table 'mnits', did you mean 'mnist'?"),
        (["--table", "mnist", "--rows", "vanila"], "has no row 'vanila', did you mean 'vanilla'?"),
        (["--config", QUICK, "--dry-run", "model.num_experts=1"], "num_experts=1 has no gate"),
        (["--config", QUICK, "--dry-run", "data.name=mnist", "data.source=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises((Ended, SystemExit), match="2"):  # a mistake in the options ends as argparse's do
        main(monkeypatch, *arguments)
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert message in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        (
            "--help",
            [
                "optimizer.weight_decay",
                "with model.kind=mixture",
                "model.importance_loss",
                "--report RUN",
                "Exit status",
            ],
        ),
        ("--list-sets", ["digits", "cifar100"]),
        ("--list-kinds", ["mixture", "vmoe", "vae", "snnl_moe"]),
        ("--list-tables", ["mnist", "fmnist_mnist", "vae"]),
    ],
)
def test_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, parts: list[str]
) -> None:
    main(monkeypatch, option)
    text = capsys.readouterr().out
    for part in parts:
        assert part in text


def test_dry_run_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(monkeypatch, "--config", QUICK, "--dry-run", f"output_dir={tmp_path}", "training.epochs=2")
    text = capsys.readouterr().out
    assert "mixture, 18,354 parameters" in text
    assert "46 steps of 64 images" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_signal_stops_a_run_that_then_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "launcher/train_vision.py", "--config", QUICK, f"output_dir={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"DS_ACCELERATOR": "cpu"}
    options = {"cwd": REPOSITORY, "env": environment}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    log = tmp_path / "digits_quick" / "metrics.jsonl"
    while first.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    told = first.communicate(timeout=120)[0]
    assert first.returncode == 75, told
    assert "stopped by SIGTERM after step" in told
    second = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **options)  # type: ignore[call-overload]
    assert second.returncode == 0, second.stderr
    assert "continuing from" in second.stderr
    assert "test error" in second.stdout
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 676
