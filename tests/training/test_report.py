"""What a finished run says: its sample is the model's own, and every figure names what it is divided by."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
import yaml

from launcher import compare, evaluate
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.data import (
    ByteTokenizer,
    CharacterTokenizer,
    Corpus,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    write_corpus,
)
from s2moe.hub import save_tokenizer
from s2moe.hub.card import write_card
from s2moe.training import metrics_log
from s2moe.training import report as closing
from s2moe.training.compare_runs import compare_runs
from s2moe.training.console import format_figures
from s2moe.training.evaluation import Score
from s2moe.training.figure import draw_run
from s2moe.training.report import comparison, sample
from tests.models.decoder import tiny

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
PROSE = "".join(f"в лесу the {i % 7} old rivers, ёлочка\n" for i in range(120))
UNITS = {"byte": "byte", "character": "character", "sentencepiece": "character", "word": "word"}


def tokenizer_of(kind: str) -> Tokenizer:
    return {
        "byte": ByteTokenizer,
        "character": lambda: CharacterTokenizer(PROSE),
        "sentencepiece": lambda: SentencePieceTokenizer.train([PROSE], 286),
        "word": lambda: WordTokenizer.from_texts([PROSE]),
    }[kind]()


@pytest.fixture(params=UNITS, scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run directory with hf/, a log of two validations of a part and one of all, and its corpus; and the symbol."""
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = tokenizer_of(request.param)
    write_corpus(directory / "data", "prose", dict.fromkeys(("train", "valid", "test"), PROSE), tokenizer)
    torch.manual_seed(0)
    tiny("smoe", vocab_size=tokenizer.vocab_size).save_pretrained(directory / "hf")
    save_tokenizer(tokenizer, directory / "hf")
    training = {"steps": 3, "global_batch": 4, "sequence_length": 16, "precision": "fp32"}
    settings = {"name": "run", "data": {"dir": str(directory / "data")}, "training": training}
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    events: list[dict[str, Any]] = []
    for step, symbols in ((1, 100), (2, 100), (3, 900)):
        layers = {f"layer_{layer}/load": [1.0] * 4 for layer in range(3)}
        events += [{"step": step, "train/loss": 2.0, "train/bpc": 3.0, "tokens": 9, "tokens_per_second": 1.0} | layers]
        events += [{"step": step, "val/bpc": 3.0 - step / 10, "val/symbols": symbols}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return directory, UNITS[request.param]


def labels_of(monkeypatch: pytest.MonkeyPatch, draw: Any) -> str:
    """The labels of all axes that are drawn."""
    found: list[str] = []
    settled = Axes.set

    def watch(axis: Axes, **values: Any) -> Any:
        found.extend(str(values.get(name, "")) for name in ("xlabel", "ylabel", "title"))
        return settled(axis, **values)

    monkeypatch.setattr(Axes, "set", watch)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: None)  # painting takes most of the time
    draw()
    return "\n".join(found)


def test_every_figure_says_what_it_is_divided_by(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory, symbol = run
    data, unit = directory / "data", f"bits per {symbol}"
    others = [f"per {other}" for other in {"byte", "character", "word", "symbol"} - {symbol}]
    common = ["--data", str(data), "--device", "cpu", "--context", "16", "--segment", "16"]
    count = Corpus.open(data).split("test").symbols

    evaluate.main(["--checkpoint", str(directory), *common])
    printed = capsys.readouterr().out
    assert f"{unit} over {count:,} {symbol}s" in printed
    answer = json.loads(printed.splitlines()[-1])
    assert (answer["symbol"], answer["symbols"]) == (symbol, count)

    said = [printed]
    report = ["--report", "collapse", "--probe-tokens", "100", "--slim", "1", "--out", str(tmp_path / "collapse")]
    said += [labels_of(monkeypatch, lambda: evaluate.main(["--checkpoint", str(directory), *common, *report]))]
    slim = ["slim", "--checkpoint", str(directory), *common, "--out", str(tmp_path / "slim"), "--repeats", "1"]
    said += [labels_of(monkeypatch, lambda: compare.main([*slim, "--latency-batch", "2"]))]
    assert json.loads((tmp_path / "slim" / "slim.json").read_text())["symbol"] == symbol
    said += [labels_of(monkeypatch, lambda: compare_runs([directory], tmp_path / "runs"))]
    said += [labels_of(monkeypatch, lambda: draw_run(directory))]
    said += [(tmp_path / "runs" / "runs.md").read_text(), capsys.readouterr().out]
    card = write_card(tmp_path, tiny("smoe").config, {"run": "x"}, directory, Corpus.open(data).tokenizer.kind)
    said += [card.read_text().split("## ")[0]]
    head = comparison(Corpus.open(data), "train", "valid", Score(100.0, 50, 40)).splitlines()[0]
    said += [head, f"bits per {format_figures({'val/bpc': 1.0}, symbol).split('/')[1].split()[0]}"]
    for text in said:
        assert unit in text, text
        assert not any(other in text.replace("bits per byte   ", "") for other in others), text


def test_the_closing_validation_is_no_point_of_the_curve(run: tuple[Path, str], tmp_path: Path) -> None:
    events = metrics_log.read(run[0] / "metrics.jsonl")
    curve, closing = metrics_log.validations(events, "bpc")
    assert [event["step"] for event in curve] == [1, 2]
    assert closing is not None
    assert closing["step"] == 3
    assert metrics_log.validations(events[:-1], "bpc") == (curve, None)
    same = [event | {"val/symbols": 900} if "val/bpc" in event else event for event in events]
    assert [event["step"] for event in metrics_log.validations(same, "bpc")[0]] == [1, 2, 3]
    (compared,) = compare_runs([run[0]], tmp_path)["runs"]
    assert [step for step, _ in compared["curve"]] == [64, 128]
    assert (compared["closing"], compared["bpc"], compared["symbols"]) == ([192, closing["val/bpc"]], 2.7, 900)


def test_the_sample_is_drawn_from_the_models_own_distribution(tmp_path: Path) -> None:
    """A token with id 0 is text like any other: here the space, of which the prompt is full."""
    tokenizer = CharacterTokenizer(" abcdefgh")
    text = "a b c d e f g h " * 20
    corpus = write_corpus(tmp_path / "c", "c", dict.fromkeys(("train", "valid", "test"), text), tokenizer)
    torch.manual_seed(1)
    model = tiny("smoe", vocab_size=9, max_position_embeddings=64, initializer_range=0.5).eval()
    model.save_pretrained(tmp_path / "hf")
    save_tokenizer(tokenizer, tmp_path / "hf")
    ids = torch.from_numpy(tokenizer.encode("a b  c   d").astype("int64"))[None]
    torch.manual_seed(5)
    with torch.no_grad():
        for _ in range(20):
            logits = model(ids, use_cache=False).logits[:, -1].float()
            ids = torch.cat((ids, torch.multinomial((logits / 0.8).softmax(-1), 1)), dim=1)
    assert sample(tmp_path / "hf", corpus, "a b  c   d", 20, 5) == tokenizer.decode(ids[0].numpy())


def test_the_closing_sample_continues_the_prompt_by_so_many_tokens_as_the_settings_say(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = run
    state = SimpleNamespace(step=3, tokens=9, seconds=1.0)
    result: Any = SimpleNamespace(score=1, hf=directory / "hf", state=state, timing=None, directory=directory)
    monkeypatch.setattr(closing, "comparison", lambda *_: "")
    said = []
    for tokens in (3, 6):
        settings = ["logging.sample_prompt=old", f"logging.sample_tokens={tokens}"]
        said.append(closing.report(load(RunConfig, directory / "config.yaml", settings), result))
        assert "\n\nsample:\nold" in said[-1]
    assert said[0] != said[1]


def test_whoever_generates_says_what_is_no_padding() -> None:
    """Without a mask transformers takes the padding id for padding wherever it stands in the prompt."""
    calls = 0
    paths = [path for folder in ("s2moe", "launcher", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    texts = {path: text for path in paths if ".generate(" in (text := path.read_text(encoding="utf-8"))}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "generate":
                calls += 1
                assert "attention_mask" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
    assert calls
