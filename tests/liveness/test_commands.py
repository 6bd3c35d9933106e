"""Every option of every command is given in a test, and one that belongs to another is refused without it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import finetuning, methods, moe_layer
from data_prep import __main__ as data_prep
from launcher import compare, evaluate, export, finetune, generate, plan, pretrain, supervise, train_vision
from launcher.common import Parser

TESTS = Path(__file__).resolve().parents[1]
COMMANDS: dict[str, Any] = {
    "pretrain": pretrain.parse,
    "supervise": supervise.parse,
    "train_vision": train_vision.parse,
    "finetune": finetune.main,
    "evaluate": evaluate.parse,
    "compare": compare.parse,
    "generate": generate.parse,
    "export": export.parse,
    "plan": plan.parse,
    "moe_layer": moe_layer.parse,
    "finetuning": finetuning.parse,
    "methods": methods.parse,
    "data_prep": lambda arguments: data_prep.build_parser().parse_args(arguments),
}
SMALLEST = {  # what must be given, for the commands whose options belong to one another
    "pretrain": ["--config", "x"],
    "train_vision": ["--config", "x"],
    "generate": ["--checkpoint", "x", "text", "--temperature", "0"],
    "moe_layer": ["--profile", "8,8,8,4,2"],
}
ELSEWHERE = {  # options that no test gives on a command line: the test of what they reach, or why there is none
    "methods --": "benchmarks/methods.py makes figures of docs/methods.md, by hand",
    "supervise --within-minutes": "tests/failures/test_supervisor.py, and below",
    "evaluate --drop-newlines": "test_options.py",
    "compare --drop-newlines": "test_options.py",
    "plan --measured": "test_options.py",
    "moe_layer --quick": "which shapes are timed",
    "moe_layer --profile": "below",
    "data_prep --legacy-enwik8": "tests/data/test_prepare_releases.py",
    "data_prep --dataset-split": "of a data set of the Hub, which tests do not reach",
}


class Found(Exception):
    """The parser of a command."""


@functools.cache
def parser_of(command: str) -> argparse.ArgumentParser:
    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Found(self)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(Parser, "parse_known_args", stop),
        pytest.raises(Found) as found,
    ):
        COMMANDS[command]([])
    parser: argparse.ArgumentParser = found.value.args[0]
    return parser


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The long names of all options, those of its subcommands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)
        yield from (name for name in action.option_strings if name.startswith("--") and name != "--help")


@functools.cache
def text_of_tests() -> str:
    own = Path(__file__)
    return "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py") if path != own)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_given_in_a_test(command: str) -> None:
    text = text_of_tests()
    for name in options_of(parser_of(command)):
        if f"{command} --" in ELSEWHERE or f"{command} {name}" in ELSEWHERE:
            continue
        plain = name.removeprefix("--").replace("-", "_")
        written = (f"{name}", f"{plain}=", f"{plain}:")
        assert any(part in text for part in written), f"{command} {name}: no test gives it"


@pytest.mark.parametrize("command", SMALLEST)
def test_an_option_is_refused_without_what_it_belongs_to(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_of(command)
    assert isinstance(parser, Parser)
    given = {name: f"--{name.replace('_', '-')}" for name in parser._needs}
    assert given
    for name, flag in given.items():
        with pytest.raises(SystemExit) as ended:
            COMMANDS[command]([*SMALLEST[command], flag, "0.5" if name == "top_p" else "3"])
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert told.startswith(f"error: {flag} goes with"), told
        assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("supervise", ["--within-minutes", "0"], "--within-minutes must be positive"),
        ("supervise", ["--within-minutes", "nan"], "--within-minutes must be positive"),
        ("generate", ["--checkpoint", "x", "text", "--temperature", "nan"], "--temperature must be a number"),
        ("finetuning", ["--data", "x", "--out", "x", "--pretrain", "name=a"], "--pretrain: name is decided"),
        ("finetuning", ["--data", "x", "--out", "x", "--finetune", "seed=3"], "seed is decided for each run: give --s"),
    ],
)
def test_what_is_absurd_or_decided_elsewhere_is_one_line(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        COMMANDS[command](arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
