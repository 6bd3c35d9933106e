"""Whatever a command is given, it ends with one line on standard error and a status, never with a traceback.

To add a case: the command line as one would type it, and a part of the line that must come. ``{d}`` is a directory with
the files that ``abused`` makes.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import zipfile
from pathlib import Path

import pytest

import launcher.common
from s2moe.data import ByteTokenizer, write_corpus

ROOT = Path(__file__).resolve().parents[1]
QUICK = str(ROOT / "configs" / "quickstart.yaml")
DIGITS = str(ROOT / "configs" / "vision" / "digits_quick.yaml")
SST2 = str(ROOT / "configs" / "finetune" / "sst2.yaml")
ALONE = "training.expert_parallel=1"


@pytest.fixture(scope="module")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What users have given, and what disks have made of it."""
    d = tmp_path_factory.mktemp("abused")
    (d / "folder").mkdir()
    (d / "empty").write_bytes(b"")
    (d / "noise").write_bytes(bytes(range(256)) * 8)
    (d / "text.txt").write_text("some words in a line\n" * 200)
    for name, text in {
        "list.yaml": "- a\n- b\n",
        "broken.yaml": "name: [a\n",
        "no_base.yaml": "base: absent.yaml\nname: x\n",
        "own_base.yaml": "base: own_base.yaml\nname: x\n",
        "section.yaml": "name: x\ntraining: 3\n",
        "typo.yaml": "name: x\ntraning: {steps: 3}\n",
        "tabs.yaml": "name: x\ntraining:\n\tsteps: 3\n",
    }.items():
        (d / name).write_text(text)
    texts = dict.fromkeys(("train", "valid", "test"), "a b c " * 50)
    for name in ("good", "cut", "no_tokenizer", "no_metadata", "later", "metadata_list", "metadata_folder", "noisy"):
        write_corpus(d / name, "letters", texts, ByteTokenizer())
    (d / "cut" / "train.bin").write_bytes(b"abc")
    (d / "no_tokenizer" / "s2moe_tokenizer.json").unlink()
    for name, content in {"no_metadata": None, "metadata_list": b"[]", "noisy": b"\xff\x00"}.items():
        path = d / name / "metadata.json"
        path.unlink() if content is None else path.write_bytes(content)
    later = d / "later" / "metadata.json"
    later.write_text(json.dumps(json.loads(later.read_text()) | {"format": 9}))
    (d / "metadata_folder" / "metadata.json").unlink()
    (d / "metadata_folder" / "metadata.json").mkdir()
    with zipfile.ZipFile(d / "empty.zip", "w"):
        pass
    return d


PRETRAIN = [
    ("", "--config is missing"),
    ("--config {d}/absent.yaml", "cannot read the configuration"),
    ("--config {d}/folder", "cannot read the configuration"),
    ("--config {d}/noise", "not a text file in UTF-8"),
    ("--config {d}/list.yaml", "at the top level, got list"),
    ("--config {d}/broken.yaml", "not valid YAML"),
    ("--config {d}/tabs.yaml", "not valid YAML"),
    ("--config {d}/no_base.yaml", "cannot read the configuration"),
    ("--config {d}/own_base.yaml", "is its own base"),
    ("--config {d}/section.yaml", "training: a section of settings, got 3"),
    ("--config {d}/typo.yaml", "did you mean training"),
    ("--config {d}/empty", "must be given"),
    ("--config {q} training.stepz=3", "did you mean training.steps"),
    ("--config {q} training.steps", "of the form section.key=value"),
    ("--config {q} training.steps=many", "training.steps: expected int"),
    ("--config {q} training.steps=-1", "training.steps"),
    ("--config {q} training.steps=[", "not valid YAML"),
    ("--config {q} training=3", "training: a section of settings"),
    ("--config {q} name=a/b", "name: must be a file name"),
    ("--config {q} name=", "name"),
    ("--config {q} model.moe.method=s2mo", "model.moe.method: expected one of smoe, switch"),
    ("--config {q} model.moe.router.name=topkk", "topkk"),
    ("--config {q} --dry-run --world-size 0", "--world-size must be at least 1"),
    ("--config {q} --dry-run --world-size x", "--world-size: invalid int value"),
    ("--config {q} --dry-run --world-size 3", "training.expert_parallel"),
    ("--bogus", "unrecognized arguments: --bogus"),
    ("--config {q} {one} data.dir={d}/absent", "is not a prepared corpus; prepare it with"),
    ("--config {q} {one} data.dir={d}/empty", "is not a prepared corpus"),
    ("--config {q} {one} data.dir={d}/no_metadata", "is not a prepared corpus"),
    ("--config {q} {one} data.dir={d}/metadata_list", "cannot be read"),
    ("--config {q} {one} data.dir={d}/metadata_folder", "cannot be read"),
    ("--config {q} {one} data.dir={d}/noisy", "cannot be read"),
    ("--config {q} {one} data.dir={d}/later", "has format 9, this version reads 1"),
    ("--config {q} {one} data.dir={d}/cut", "train.bin has 3 bytes"),
    ("--config {q} {one} data.dir={d}/no_tokenizer", "tokenizer"),
]
VISION = [
    ("", "--config is missing"),
    ("--config {v} data.name=minst", "did you mean"),
    ("--config {v} model.kind=mixtur", "did you mean"),
    ("--config {v} model.gatee=attentive", "unknown key"),
    ("--config {v} --dry-run data.source={d}/text.txt", "matters only with data.name!=digits"),
    ("--config {v} --dry-run data.name=mnist data.source={d}/absent", "does not exist; give data.source"),
    ("--config {v} --dry-run data.name=mnist data.source={d}/noise", "neither an archive nor one of"),
    ("--config {v} --dry-run data.name=mnist data.source={d}/empty.zip", "has no train-images"),
    ("--config {v} --dry-run data.name=mnist data.source={d}/folder", "has no train-images"),
    ("--config {v} --dry-run 'data.options={{partial: true}}'", "digits has no option 'partial'"),
    ("--config {v} --dry-run data.name=quickdraw 'data.options={{classes: [cat, cat]}}'", "list of different names"),
    ("--config {v} --dry-run data.name=quickdraw 'data.options={{classes: cat}}'", "list of different names"),
    ("--config {v} --dry-run data.name=synthetic_strokes 'data.options={{train: -1}}'", "must be a number of drawings"),
    ("--config {v} data.fraction=nan", "data.fraction"),
    ("--table nonsense", "nonsense"),
    ("--table mnist --source {d} data.source={d}", "say the same"),
    ("--table mnist --config {v}", "exclude one another"),
    ("--rows a", "goes with --table"),
    ("--report {d}/absent", "absent"),
    ("--report {d}/folder", "folder"),
]
FINETUNE = [
    ("", "--config is missing"),
    ("--config {f} data.task=sst3", "data.task: expected one of"),
    ("--config {f} data.task=own", "must say where your files are"),
    ("--config {f} data.text_column=a", "matters only with data.task=own"),
    ("--config {f} data.validation=nan", "data.validation"),
    ("--config {f} training.batch=0", "training.batch"),
]
PREPARE = [
    ("text --source {d}/noise --out {d}/o", "is not text"),
    ("text --source {d}/empty --out {d}/o", "there is no text in it"),
    ("text --source {d}/empty.zip --out {d}/o", "holds not one file but nothing"),
    ("text --source {d}/folder --out {d}/o", "give a glob in quotes"),
    ("text --source {d}/text.txt --out {d}/text.txt", "is not a corpus"),
    ("text --source {d}/text.txt --fractions nan nan nan --out {d}/o", "must be above 0"),
    ("text8 --source {d}/text.txt --out {d}/o", "too few to hold out"),
    ("enwik8 --source {d}/absent --out {d}/o", "does not exist"),
    ("wikitext103 --source {d}/folder --out {d}/o", "no file wiki.train.tokens"),
]
READ = [
    ("generate --checkpoint {d}/absent hello", "absent"),
    ("generate --checkpoint {d}/folder hello", "folder"),
    ("generate --checkpoint {d}/empty hello", "empty"),
    ("generate --checkpoint {d}/folder hello --tokens 0", "--tokens must be at least 1"),
    ("generate --checkpoint {d}/folder hello --temperature -1", "must be a number and not negative"),
    ("generate --checkpoint {d}/folder hello --top-p 2", "--top-p"),
    ("evaluate --checkpoint {d}/absent --data {d}/good", "absent"),
    ("evaluate --checkpoint {d}/folder --data {d}/good", "folder"),
    ("evaluate --checkpoint {d}/folder --data {d}/good --batch 0", "must be at least 1"),
    ("evaluate --checkpoint {d}/folder --data {d}/good --corrupt word_swap", "needs --rate"),
    ("evaluate --checkpoint {d}/folder --data {d}/good --corrupt word_swap --rate 2", "must lie in 0..1"),
    ("compare slim --checkpoint {d}/absent --data {d}/good --out {d}/o", "absent"),
    ("compare runs {d}/folder --out {d}/o", "folder"),
    ("export --checkpoint {d}/absent", "absent"),
    ("export reshape --checkpoint {d}/folder", "folder"),
    ("export import --model {d}/absent --out {d}/o", "absent"),
    ("plan --config {q} --gpu h1000", "h1000"),
    ("plan --config {q} --gpus-per-node 0", "must be at least 1"),
    ("plan --config {q} --measured {d}/noise", "noise"),
    ("supervise --config {q} --processes 0", "--processes must be at least 1"),
    ("supervise", "--config is missing"),
    ("doctor training.steps=3", "needs --config"),
]
CASES = [
    *((f"pretrain {words}", problem) for words, problem in PRETRAIN),
    *((f"train_vision {words}", problem) for words, problem in VISION),
    *((f"finetune {words}", problem) for words, problem in FINETUNE),
    *((f"data_prep {words}", problem) for words, problem in PREPARE),
    *READ,
]
ENVIRONMENTS = [
    ({"RANK": "x"}, "RANK is 'x'"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ({"LOCAL_RANK": "x", "RANK": "x"}, "RANK is 'x'"),
]


@pytest.fixture(autouse=True)
def _raises_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the process at once raises SystemExit here."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(launcher.common, "leave", leave)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what is set here is undone
        monkeypatch.delenv(name)


def end_of(words: list[str]) -> int:
    """The status that a command ends with. Any other exception is the traceback that a user would see."""
    command, *arguments = words
    module = importlib.import_module("data_prep.__main__" if command == "data_prep" else f"launcher.{command}")
    try:
        with launcher.common.user_errors():
            return int(module.main(arguments) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1


@pytest.mark.parametrize(("line", "problem"), CASES, ids=[line for line, _ in CASES])
def test_one_line_and_a_status(abused: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str) -> None:
    before = sorted(os.listdir(abused))
    filled = line.format(d=abused, q=QUICK, v=DIGITS, f=SST2, one=ALONE)
    status = end_of(shlex.split(filled))
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.err.count("\n") == 1, captured.err
    assert "error: " in captured.err
    assert problem in captured.err
    assert sorted(os.listdir(abused)) == before  # nothing is begun


@pytest.mark.parametrize(("variables", "problem"), ENVIRONMENTS)
def test_an_environment_that_cannot_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert end_of(["pretrain", "--config", QUICK, "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("\n") == 1
