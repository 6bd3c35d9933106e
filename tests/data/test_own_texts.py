"""One's own texts and classes: every form of table, what is held out, what is refused, how it is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from s2moe.config import ConfigError, load
from s2moe.config.finetune import FinetuneConfig
from s2moe.data import CorpusError
from s2moe.data.classification import ClassificationData, load_classification
from s2moe.finetuning.run import load_data
from s2moe.training.processes import Processes

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "finetune" / "own.yaml"
ODD = "no-break\u00a0space, next\u0085line, \u3000wide, line\u2028end"  # what str.splitlines and str.split cut
ROWS = [(f'{ODD} "{number}"', ("dull", "fine", "great")[number % 3]) for number in range(30)]


def table(form: str, rows: list[tuple[str, str]], text: str = "text", label: str = "label") -> bytes:
    if form == "jsonl":
        content = "".join(json.dumps({text: a, label: b}, ensure_ascii=False) + "\n" for a, b in rows)
    elif form == "tsv":
        content = "".join(f"{b}\t{a}\r\n" for a, b in [(text, label), *rows])
    else:
        quoted = ('"' + a.replace('"', '""') + '"' for a, _ in rows)
        content = f"{text},{label}\n" + "".join(f"{a},{b}\n" for a, (_, b) in zip(quoted, rows, strict=True))
    return b"\xef\xbb\xbf" + content.encode()


def load_own(source: Path, **options: tuple[str, str]) -> ClassificationData:
    return load_classification("own", source, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_a_directory_of_tables(tmp_path: Path, form: str) -> None:
    source = tmp_path / "reviews"
    source.mkdir()
    for split, part in (("train", ROWS[:24]), ("dev", ROWS[24:27]), ("test", ROWS[27:])):
        (source / f"{split}.{form}").write_bytes(table(form, part))
    data = load_own(source)
    assert (data.name, data.classes) == ("reviews", ("dull", "fine", "great"))
    assert data.train.texts == [text for text, _ in ROWS[:24]]
    assert data.validation.labels == data.test.labels == [0, 1, 2]
    assert data.notes == [f"own files: train.{form}, dev.{form}, test.{form}"]


def test_one_table_is_split(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_bytes(
        table("csv", [(text, str(10 - index % 3)) for index, (text, _) in enumerate(ROWS)], "Review", "stars")
    )
    data = load_own(path, columns=("review", "stars"))
    assert (data.name, data.classes) == ("reviews", ("8", "9", "10"))
    assert data.sizes() == {"train": 24, "validation": 3, "test": 3}
    assert len({*data.train.texts, *data.validation.texts, *data.test.texts}) == 30
    assert data.notes == ["own files: reviews.csv", "test: 3 texts of train", "validation: 3 texts of train"]


def test_a_run_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_bytes(table("jsonl", ROWS, "body", "class"))
    settings = [f"data.source={path}", "data.text_column=body", "data.label_column=class", "data.validation=0.2"]
    alone = Processes(0, 0, 1, torch.device("cpu"))
    data = load_data(load(FinetuneConfig, CONFIG, settings), alone)
    assert (data.name, data.sizes()) == ("reviews", {"train": 18, "validation": 6, "test": 6})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no train.csv, train.tsv or train.jsonl"),
        ({"train.csv": b"text,label\na,1\nb,2\n", "train.tsv": b"x"}, "train.csv and train.tsv are both train"),
        ({"train.csv": b"body,label\na,1\n"}, r"columns text and label, got \['body', 'label'\]"),
        ({"train.csv": b"text,label\na,1\nb\n"}, "line 3: expected 2 columns, got 1: 'b'"),
        ({"train.csv": b'text,label\na,1\n"b,2\n'}, "line 3: not a line of a .csv"),
        ({"train.csv": b"text,label\na\xff,1\n"}, "cannot be read"),
        ({"train.csv": b"text,label\na,1\nb,\n"}, "a label is empty"),
        ({"train.csv": b"text,label\na,1\nb,1 \n"}, "fewer than two classes"),
        ({"train.csv": b"text,label\na,1\nb,2\n", "test.csv": b"text,label\na,3\n"}, "train has none of: 3"),
        ({"train.jsonl": b'{"text": "a", "label": 1}\n{"text": "b"}\n'}, "line 2: no field 'label'"),
        ({"train.jsonl": b'{"text": ["a"], "label": 1}\n'}, "line 1: the field 'text' must be a text"),
        ({"train.jsonl": b"text\n"}, "line 1 is not a JSON object"),
        ({"train.csv": b"text,label\n ,1\nb,2\nc,1\nd,2\n", "test.csv": b"text,label\na,1\n"}, "a text is empty"),
        ({"train.csv": b""}, r"columns text and label, got \[\]"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as raised:
        load_own(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data.source: must say where your files are"),
        (["data.source=x", "data.official=false"], r"data\.official: matters only with data\.task!=own"),
        (["data.task=sst2", "data.text_column=review"], r"data\.text_column: matters only with data\.task=own"),
        (["data.task=imdb", "data.label_column=stars"], r"data\.label_column: matters only with data\.task=own"),
    ],
)
def test_settings_of_other_tasks_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(FinetuneConfig, CONFIG, overrides)
    assert load(FinetuneConfig, CONFIG, ["data.source=x", "data.text_column=review"]).data.task == "own"
