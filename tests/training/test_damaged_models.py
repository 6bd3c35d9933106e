"""Whatever loads a model loads all of it, or ends with one line that names what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from launcher import compare, evaluate, export, generate
from s2moe.config import ConfigError
from s2moe.config.run import InitConfig
from s2moe.data import ByteTokenizer, CharacterTokenizer, Corpus, CorpusError, write_corpus
from s2moe.finetuning.loading import load_pretrained
from s2moe.hub import save_tokenizer
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.vision import VISION_KINDS
from s2moe.training import metrics_log, probe_files
from s2moe.training.checkpoint import find_latest, open_checkpoint
from s2moe.training.compare_runs import compare_runs
from s2moe.training.generation import continue_text
from s2moe.training.initial import InitialWeights
from s2moe.training.report import sample
from s2moe.training.report_collapse import report_collapse
from s2moe.training.slim import compare_slim
from s2moe.training.standalone import evaluate_weights, find_device
from s2moe.training.vision_initial import load_vision_model
from s2moe.training.weights import load_run_weights
from tests.hub.foreign import foreign
from tests.models.decoder import tiny

from .jobs import tiny_corpus, tiny_run

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, a corpus; sparse/, a model of ours; dense/ and mixtral/, what upcycling and import take."""
    directory = tmp_path_factory.mktemp("whole")
    tiny_corpus(directory / "data")
    tiny("s2moe", vocab_size=256, max_position_embeddings=32).save_pretrained(directory / "sparse")
    tiny("smoe", vocab_size=256, moe_first_dense=3).save_pretrained(directory / "dense")
    foreign("mixtral").save_pretrained(directory / "mixtral")
    for name in ("sparse", "dense"):
        save_tokenizer(ByteTokenizer(), directory / name)
    return directory


def change(**values: Any) -> Callable[[Path], None]:
    def damage(hf: Path) -> None:
        settings = json.loads((hf / CONFIG).read_text())
        (hf / CONFIG).write_text(json.dumps(settings | {name: make(settings) for name, make in values.items()}))

    return damage


def rewrite(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(hf: Path) -> None:
        (hf / name).write_bytes(content((hf / name).read_bytes()))

    return damage


def remove(hf: Path) -> None:
    (hf / WEIGHTS).unlink()


def index_of_missing_files(hf: Path) -> None:
    (hf / WEIGHTS).rename(hf / "model-00001-of-00002.safetensors")
    (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "model-00002-of-00002.safetensors"}}))


def index_that_is_a_list(hf: Path) -> None:
    (hf / WEIGHTS).unlink()
    (hf / INDEX).write_text("[1]")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer more": (change(num_hidden_layers=lambda c: c["num_hidden_layers"] + 1), "they lack .* and .* more"),
    "a layer fewer": (
        change(num_hidden_layers=lambda c: c["num_hidden_layers"] - 1),
        "has no place for .* and .* more",
    ),
    "another vocabulary": (change(vocab_size=lambda c: c["vocab_size"] + 1), "of another size than the model's"),
    "truncated": (rewrite(WEIGHTS, lambda data: data[:-100]), "cannot be read"),
    "garbled": (rewrite(WEIGHTS, lambda data: b"\xff" * len(data)), "cannot be read"),
    "empty": (rewrite(WEIGHTS, lambda data: b""), "cannot be read"),
    "missing": (remove, "cannot be read"),
    "an index of missing files": (index_of_missing_files, "cannot be read"),
    "an index that is a list": (index_that_is_a_list, "cannot be read"),
    "a configuration that is a list": (rewrite(CONFIG, lambda data: b"[1]"), "no settings of a model"),
    "a configuration that is no JSON": (rewrite(CONFIG, lambda data: data[:-20]), "cannot be read"),
    "a configuration that is binary": (rewrite(CONFIG, lambda data: b"\xff\xfe\x00"), "cannot be read"),
    "no attention heads": (change(num_attention_heads=lambda c: 0), "cannot be read|num_attention_heads"),
}


def scoring(hf: Path, whole: Path) -> list[str]:
    return ["--checkpoint", str(hf), "--data", str(whole / "data"), "--device", "cpu", "--max-symbols", "100"]


def begin(hf: Path, whole: Path) -> InitialWeights:
    config = S2MoEConfig.from_pretrained(whole / "sparse")
    return InitialWeights(InitConfig(weights=str(hf)), config, ByteTokenizer().fingerprint(), seed=1)


def converted(form: str) -> Callable[[Path, Path], Any]:
    return lambda hf, whole: export.convert(export.parse([form, "--model", str(hf), "--out", str(hf.parent / "out")]))


LOADERS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "evaluate": ("sparse", lambda hf, whole: evaluate_weights(evaluate.parse(scoring(hf, whole)))),
    "collapse": (
        "sparse",
        lambda hf, whole: report_collapse(
            evaluate.parse([*scoring(hf, whole), "--report", "collapse", "--out", str(hf.parent / "out")])
        ),
    ),
    "slim": (
        "sparse",
        lambda hf, whole: compare_slim(
            compare.parse(["slim", *scoring(hf, whole), "--out", str(hf.parent / "out"), "--repeats", "1"])
        ),
    ),
    "generate": (
        "sparse",
        lambda hf, whole: continue_text(generate.parse(["--checkpoint", str(hf), "ab", "--tokens", "2"])),
    ),
    "closing sample": ("sparse", lambda hf, whole: sample(hf, Corpus.open(whole / "data"), "ab", 2, 0)),
    "weights of a run": ("sparse", lambda hf, whole: load_run_weights(hf)),
    "fine-tuning": ("sparse", lambda hf, whole: load_pretrained(AutoModelForSequenceClassification, hf)),
    "init.weights": ("sparse", begin),
    "upcycle": ("dense", converted("upcycle")),
    "import": ("mixtral", converted("import")),
    "to-transformers": ("sparse", converted("to-transformers")),
}


def one_line(work: Callable[[], Any]) -> str:
    """The message of the error that a user gets as one line."""
    with pytest.raises((ConfigError, CorpusError)) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_is_read_whole_or_not_at_all(
    whole: Path, tmp_path: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2moe.training.report_collapse.draw_report", lambda *_: [])
    source, work = LOADERS[loader]
    for name, (damage, wanted) in DAMAGES.items():
        hf = tmp_path / name.replace(" ", "-") / "hf"
        shutil.copytree(whole / source, hf)
        damage(hf)
        message = one_line(lambda hf=hf: work(hf, whole))  # type: ignore[misc]
        assert str(hf) in message, (name, message)
        assert re.search(wanted, message), (name, message)
        assert len(message) < 1000, (name, message)
        assert not (hf.parent / "out").exists(), name
    sound = tmp_path / "sound" / "hf"
    shutil.copytree(whole / source, sound)
    if loader != "to-transformers":  # S2MoE has a gate of its own, which no model of transformers expresses
        work(sound, whole)


def test_a_new_head_is_drawn_where_it_is_asked_for(whole: Path) -> None:
    model = load_pretrained(AutoModelForSequenceClassification, whole / "sparse", changes={"num_labels": 3})
    assert model.score.weight.shape[0] == 3


def test_a_vision_model_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    kind = VISION_KINDS["mixture"]
    torch.manual_seed(0)
    kind.model(kind.config()).save_pretrained(tmp_path / "whole")
    load_vision_model(tmp_path / "whole")
    for name in ("truncated", "garbled", "missing", "a configuration that is a list", "an index of missing files"):
        hf = tmp_path / name.replace(" ", "-")
        shutil.copytree(tmp_path / "whole", hf)
        DAMAGES[name][0](hf)
        assert str(hf) in one_line(lambda hf=hf: load_vision_model(hf))  # type: ignore[misc]
    hf = tmp_path / "more"
    shutil.copytree(tmp_path / "whole", hf)
    change(num_experts=lambda c: c["num_experts"] + 1)(hf)
    assert "are not those of its configuration" in one_line(lambda: load_vision_model(hf))


def test_a_tokenizer_of_another_model_is_refused_where_its_ids_do_not_exist(whole: Path, tmp_path: Path) -> None:
    tiny("smoe", vocab_size=64).save_pretrained(tmp_path)
    save_tokenizer(ByteTokenizer(), tmp_path)
    options = generate.parse(["--checkpoint", str(tmp_path), "zebra", "--tokens", "2"])
    assert "gives the prompt the id 122" in one_line(lambda: continue_text(options))


def test_a_corpus_with_ids_beyond_its_vocabulary_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a split is too large to be compared with its checksum."""
    monkeypatch.setattr("s2moe.data.corpus.VERIFIED_BYTES", 0)
    text = "abc" * 100
    corpus = write_corpus(
        tmp_path / "c", "c", dict.fromkeys(("train", "valid", "test"), text), CharacterTokenizer("abc")
    )
    tiny("smoe", vocab_size=3).save_pretrained(tmp_path / "hf")
    corpus.path("test").write_bytes(b"\x00\x01\x09" * 100)
    for more in ([], ["--corrupt", "char_swap", "--rate", "0.1"]):
        options = evaluate.parse(["--checkpoint", str(tmp_path / "hf"), "--data", str(tmp_path / "c"), *more])
        assert "has the id 9" in one_line(lambda options=options: evaluate_weights(options))  # type: ignore[misc]


def test_a_damaged_log_or_probe_of_a_run_is_named(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole / "sparse", run / "hf")
    shutil.copy(tiny_run(run)[0], run / "config.yaml")
    for content in (b"\xff\xfe\x00\x80", b"[1]\n", b'{"train/loss": 1}\n', b'{"step": 1, "train/loss": 1}\n{"st'):
        (run / "metrics.jsonl").write_bytes(content)
        assert "metrics.jsonl" in one_line(lambda: compare_runs([run], tmp_path / "out"))
        arguments = [*scoring(run, whole), "--report", "collapse"]
        assert "metrics.jsonl" in one_line(lambda: report_collapse(evaluate.parse(arguments)))  # noqa: B023
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    assert "metrics.jsonl" in one_line(lambda: metrics_log.truncate(run / "metrics.jsonl", 3))

    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0, "layer_0/load": [1, 1, 1, 1]}\n')
    probe = run / "probes" / "step-00000001.npz"
    probe.parent.mkdir()
    for content in (b"", b"\xff" * 50, b"PK\x03\x04" + b"\x00" * 50):
        probe.write_bytes(content)
        assert str(probe) in one_line(lambda: probe_files.read_all(probe.parent))
        assert str(probe) in one_line(lambda: report_collapse(evaluate.parse(arguments)))


def test_a_manifest_that_is_a_folder_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    (checkpoint / "manifest.json").mkdir(parents=True)
    warned: list[str] = []
    assert find_latest(checkpoint.parent, warned.append) is None
    assert "manifest.json cannot be read" in warned[0]
    assert "manifest.json cannot be read" in one_line(lambda: open_checkpoint(checkpoint))
    assert "no weights in" in one_line(lambda: load_run_weights(tmp_path))


@pytest.mark.parametrize("name", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_cannot_compute_is_refused(name: str) -> None:
    assert "give " in one_line(lambda: find_device(name))


@pytest.mark.parametrize("given", [("--temperature", "nan"), ("--temperature", "inf"), ("--seed", str(2**70))])
def test_settings_of_sampling_that_are_no_numbers_are_refused(
    given: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        generate.parse(["--checkpoint", "x", "a", *given])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {given[0]} must be a number")
