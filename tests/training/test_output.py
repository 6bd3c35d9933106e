"""Output that nobody takes: runs go on, commands end quietly or with one line."""

from __future__ import annotations

import importlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from launcher import common
from s2moe.output import guard_output, output_is_spare
from s2moe.training.console import Console
from tests.forked import broken_pipe, forked, full_disk

from .jobs import tiny_run
from .test_launcher import REPOSITORY

WAYS = {"a broken pipe": broken_pipe, "a full disk": full_disk}


def of_a_run() -> None:
    """All kinds of output that a run has, more than one buffer of each."""
    guard_output()
    output_is_spare()
    console, log = Console(1000), logging.StreamHandler(sys.stderr)
    for step in range(300):
        print(f"step {step}", flush=step % 2 == 0)
        console.event(step, {"train/loss": 1.0})
        console.say("something " * 30)
        warnings.warn(f"warning {step}", stacklevel=1)
        log.emit(logging.LogRecord("library", logging.ERROR, "", 0, "message", None, None))
        os.write(1, b"written by a library that is not Python\n")
        os.write(2, b"written by a library that is not Python\n")
    for _ in tqdm(range(20), file=sys.stderr, mininterval=0):
        pass


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_without_its_output(way: str) -> None:
    ended = forked(of_a_run, output=WAYS[way]())
    assert ended.status == 0
    assert ended.errors.count("warning: standard output cannot be written (") == 1
    assert "Traceback" not in ended.errors
    ended = forked(of_a_run, errors=WAYS[way]())
    assert ended.status == 0
    assert ended.output.count("warning: standard error cannot be written (") == 1
    assert "step 299" in ended.output
    both = WAYS[way]()
    assert forked(of_a_run, output=both, errors=both).status == 0


def test_a_closed_stream_is_no_file_of_the_run(tmp_path: Path) -> None:
    def write() -> None:
        guard_output()
        print("something")
        print("something", file=sys.stderr, flush=True)
        with open(tmp_path / "checkpoint", "wb", buffering=0) as file:
            os.write(1, b"printed by a library")
            file.write(b"weights")

    assert forked(write, output=-1, errors=-1).status == 0
    assert (tmp_path / "checkpoint").read_bytes() == b"weights"


def command(main: Callable[[list[str]], Any], *arguments: str) -> Callable[[], None]:
    """It, as `common.run` runs it."""

    def action() -> None:
        sys.argv = ["command", *arguments]
        common.quiet_libraries = lambda: None  # type: ignore[assignment]
        common.run(main)

    return action


# Each prints a page or more.
PRINTING = {
    "pretrain": ["--list-methods"],
    "train_vision": ["--list-sets"],
    "finetune": ["--help"],
    "plan": ["--help"],
    "export": ["--help"],
    "evaluate": ["--help"],
}


@pytest.mark.parametrize("name", PRINTING)
def test_commands_whose_reader_has_had_enough_end_quietly(name: str) -> None:
    main = importlib.import_module(f"launcher.{name}").main
    ended = forked(command(main, *PRINTING[name]), output=broken_pipe())
    assert (ended.status, ended.errors) == (0, "")
    ended = forked(command(main, *PRINTING[name]), output=full_disk())
    assert ended.status == 3  # what it was asked for is not there
    assert ended.errors == (
        "error: cannot write standard output: No space left on device: make room, and start it again\n"
    )


def test_data_prep_whose_output_cannot_be_written(tmp_path: Path) -> None:
    from data_prep.__main__ import main

    def prepare(name: str) -> Callable[[], None]:
        def action() -> None:
            guard_output()
            raise SystemExit(main(["embedded", "--out", str(tmp_path / name)]))

        return action

    ended = forked(prepare("one"), output=broken_pipe())
    assert (ended.status, ended.errors) == (0, "")
    ended = forked(prepare("two"), output=full_disk())
    assert ended.status == 2
    assert ended.errors.startswith("data_prep: error: standard output: No space left on device")
    assert len(ended.errors.splitlines()) == 1


@pytest.mark.parametrize("given", [None, b"\xff\xfe no text"])
def test_a_prompt_that_cannot_be_read_is_one_line(given: bytes | None) -> None:
    from launcher.generate import main

    def generate() -> None:
        sys.stdin = None if given is None else io.TextIOWrapper(io.BytesIO(given), "utf-8")  # type: ignore[assignment]
        command(main, "--checkpoint", "x", "-")()

    ended = forked(generate)
    assert ended.status == 2
    assert ended.errors.startswith("error: - reads the prompt from standard input, which ")
    assert len(ended.errors.splitlines()) == 1


@pytest.mark.slow
def test_a_run_into_head(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    writes = broken_pipe()
    script = str(REPOSITORY / "launcher" / "pretrain.py")
    arguments = ["--config", path, *overrides, "training.expert_parallel=1"]
    process = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, stdout=writes, stderr=writes, timeout=240, check=False
    )
    assert process.returncode == 0
    assert (tmp_path / "runs" / "tiny" / "hf" / "model.safetensors").is_file()
