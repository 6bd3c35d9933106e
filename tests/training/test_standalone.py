"""Evaluating and exporting weights: what they were trained with is checked, and nothing else is overwritten."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher import compare
from launcher.evaluate import parse
from s2moe.config import ConfigError
from s2moe.data import ByteTokenizer, CharacterTokenizer, CorpusError, SentencePieceTokenizer, write_corpus
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.training.evaluation import Protocol
from s2moe.training.export import write_hf
from s2moe.training.standalone import evaluate_weights, export_checkpoint, find_device, protocol_of
from s2moe.training.weights import Weights, find_weights
from s2moe.training.windows import LEGACY_PROTOCOLS
from tests.distributed_harness import run_distributed

from .jobs import tiny_run

TEXT = "abcab cabba " * 40


def exported(target: Path, tokenizer: Any, vocab_size: int = 256) -> Path:
    """A small untrained model with its tokenizer, as a run exports it."""
    config = S2MoEConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        moe={"num_experts": 2, "expert_hidden": 16},
    )
    torch.manual_seed(0)
    write_hf(config, S2MoEForCausalLM(config).state_dict(), target, tokenizer, {"run": "x", "step": 3})
    return target


def evaluate(hf: Path, corpus: Path, *arguments: str) -> dict[str, Any]:
    return evaluate_weights(parse(["--checkpoint", str(hf), "--data", str(corpus), "--device", "cpu", *arguments]))


def test_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    target = exported(tmp_path / "hf", ByteTokenizer())
    exported(target, ByteTokenizer())
    other = tmp_path / "thesis"
    other.mkdir()
    exported(other, None)  # an empty directory holds nothing that could be lost
    other = tmp_path / "notes"
    other.mkdir()
    (other / "chapter.txt").write_text("text")
    with pytest.raises(ConfigError, match="notes exists and is not an exported model: give another --out"):
        exported(other, None)
    assert (other / "chapter.txt").read_text() == "text"


def test_the_tokenizer_must_be_that_of_training(tmp_path: Path) -> None:
    hf = exported(tmp_path / "hf", ByteTokenizer())
    splits = {"train": TEXT, "valid": TEXT, "test": TEXT}
    for name, tokenizer in (("bytes", ByteTokenizer()), ("characters", CharacterTokenizer(sorted(set(TEXT))))):
        write_corpus(tmp_path / name, name, splits, tokenizer)
    answer = evaluate(hf, tmp_path / "bytes", "--context", "8", "--segment", "8")
    assert (answer["symbols"], answer["attention_window"]) == (len(TEXT), 16)
    assert evaluate(hf, tmp_path / "bytes", "--context", "8", "--segment", "4")["bpc"] != answer["bpc"]
    with pytest.raises(ConfigError, match=r"was trained with the tokenizer byte:.*characters has char.*: give"):
        evaluate(hf, tmp_path / "characters")


def test_scores_of_corrupted_context_stand_beside_the_clean_ones(tmp_path: Path) -> None:
    hf = exported(tmp_path / "hf", ByteTokenizer())
    write_corpus(tmp_path / "bytes", "bytes", {"train": TEXT, "valid": TEXT, "test": TEXT}, ByteTokenizer())
    sizes = ("--context", "8", "--segment", "8")
    clean = evaluate(hf, tmp_path / "bytes", *sizes)
    assert clean["corruption"] is None

    answers = []
    for arguments in (("--rate", "0.3"), ("--rate", "0.3"), ("--rate", "0.3", "--corrupt-seed", "1"), ("--rate", "0")):
        answer = evaluate(hf, tmp_path / "bytes", *sizes, "--corrupt", "word_swap", *arguments)
        assert {key: answer[key] for key in clean if key != "corruption"} == {
            key: value for key, value in clean.items() if key != "corruption"
        }
        found = answer["corruption"]
        assert found["bpc"] - clean["bpc"] == found["bpc_increase"]
        answers.append(found)
    first, again, other, none = answers
    assert first == again
    assert (first["kind"], first["rate"], first["seed"], other["seed"]) == ("word_swap", 0.3, 0, 1)
    assert first["bpc_increase"] != 0
    assert first["bpc"] != other["bpc"]
    assert 0.1 < first["changed"] < 0.5
    assert (none["bpc"], none["bpc_increase"], none["changed"]) == (clean["bpc"], 0.0, 0.0)
    assert none["perplexity"] == clean["perplexity"]

    everything = evaluate(
        hf, tmp_path / "bytes", *sizes, "--corrupt", "word_swap", "--rate", "1", "--max-symbols", "12"
    )
    assert everything["corruption"]["changed"] == 10 / 12  # "abcab cabba "


def test_corruption_of_subwords_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer.train([TEXT + "\n"], 262)
    hf = exported(tmp_path / "hf", tokenizer, vocab_size=tokenizer.vocab_size)
    write_corpus(tmp_path / "pieces", "pieces", {"train": TEXT, "valid": TEXT, "test": TEXT}, tokenizer)
    with pytest.raises(CorpusError, match=r"not defined for tokens of the kind 'sentencepiece'.*parts of words"):
        evaluate(hf, tmp_path / "pieces", "--corrupt", "word_swap", "--rate", "0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--corrupt", "word_swap"), "--corrupt needs --rate"),
        (("--rate", "0.1"), "--rate and --corrupt-seed belong to --corrupt"),
        (("--corrupt-seed", "3"), "--rate and --corrupt-seed belong to --corrupt"),
        (("--corrupt", "typos", "--rate", "0.1"), "invalid choice: 'typos'"),
        (("--corrupt", "char_swap", "--rate", "1.5"), "argument --rate: must lie in 0..1, got 1.5"),
        (("--corrupt", "char_swap", "--rate", "0.1", "--report", "collapse"), "run them one after the other"),
    ],
    ids=str,
)
def test_impossible_corruptions(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "x", "--data", "y", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            (option, value, "--report")
            for option, value in (
                ("--out", "x"),
                ("--against", "x"),
                ("--slim", "1,2"),
                ("--probe-tokens", "100"),
                ("--probe-samples", "100"),
            )
        ),
        *(
            (option, "512", "--protocol sliding", "--protocol", protocol)
            for option in ("--context", "--segment")
            for protocol in LEGACY_PROTOCOLS
        ),
        ("--context", "512", "--protocol sliding", "--protocol", "l1", "--report", "collapse"),
        ("--corrupt-seed", "0", "--corrupt"),
    ],
    ids=" ".join,
)
def test_options_without_their_partner(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """The default's value is refused too, since it was given."""
    option, value, partner, *more = arguments
    with pytest.raises(SystemExit) as ended:
        parse(["--checkpoint", "x", "--data", "y", option, value, *more])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert option in error
    assert f"{'belong' if partner == '--corrupt' else 'belongs'} to {partner}" in error
    if option in ("--context", "--segment"):
        slim = ["slim", "--checkpoint", "x", "--data", "y", option, value, *more[:2]]
        with pytest.raises(SystemExit):
            compare.parse(slim)


@pytest.mark.parametrize(
    "option", ["context", "segment", "batch", "max-symbols", "attention-window", "experts-per-token"]
)
def test_a_size_that_is_asked_for_is_that_of_the_protocol(option: str) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16))
    options = parse(["--checkpoint", "x", "--data", "y", f"--{option}", "3"])
    assert getattr(protocol_of(options, model), option.replace("-", "_")) == 3


def test_a_protocol_with_sizes_of_its_own_is_recorded_without_those_of_another() -> None:
    sizes = Protocol(context=8, segment=9, attention_window=4).settings()
    assert sizes == {"name": "sliding", "context": 8, "segment": 9, "attention_window": 4}
    assert Protocol("l1", 8, 9).settings() == {
        "name": "l1",
        "context": None,
        "segment": None,
        "attention_window": None,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("--attention-window", "-5"),
        ("--context", "-1"),
        ("--batch", "0"),
        ("--segment", "0"),
        ("--max-symbols", "0"),
        ("--experts-per-token", "0"),
    ],
)
def test_impossible_numbers(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "x", "--data", "y", *arguments])
    assert f"argument {arguments[0]}: must " in capsys.readouterr().err


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(None) == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda: this machine has 0 GPUs"):
        find_device("cuda")
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        find_device("gpu")


def test_a_finished_run_is_exported_from_its_checkpoint(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    run_distributed("tests.training.jobs:train", 1, path, [*overrides, "training.steps=2"])
    run = tmp_path / "runs" / "tiny"
    weights = find_weights(run)
    assert weights.hf == run / "hf"
    target = export_checkpoint(run, tmp_path / "out", None)
    assert Weights(hf=target).tokenizer == weights.tokenizer
    assert (target / "model.safetensors").read_bytes() == (run / "hf" / "model.safetensors").read_bytes()
