"""Texts with a class, for fine-tuning: SST-2, SST-5, IMDB and BANKING77, from their official files.

Every set has three splits that share no role: the model learns from `train`, the best epoch is chosen on
`validation`, and `test` is looked at once, at the end.

    set        test                         validation
    sst5       the treebank's test          the treebank's dev
    sst2       the treebank's test          the treebank's dev     (from trees: sentences, label 2 left out)
    sst2       GLUE's dev                   part of train          (from GLUE's files: test has no labels there)
    imdb       the official test            part of train
    banking77  the official test            part of train

What is carved out of train is drawn within each class by a hash of the text, so that it does not depend on the
order of the file, and all copies of a text fall on the same side.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from s2moe.data.archives import Files
from s2moe.data.errors import CorpusError


class Examples(NamedTuple):
    """Texts and the number of each one's class, of equal length."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class ClassificationData:
    """A set of three splits. ``notes`` is what must be said beside a figure."""

    name: str
    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    notes: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Texts of each split."""
        return {name: len(getattr(self, name).texts) for name in ("train", "validation", "test")}


class Raw(NamedTuple):
    """What the official files hold: validation None where it has to be carved out of train."""

    classes: tuple[str, ...]
    train: Examples
    validation: Examples | None
    test: Examples
    form: str  # which of a set's official forms it is


class Task(NamedTuple):
    """A set: how to read it, where its files are, and how many texts train, validation and test have in each form."""

    read: Callable[[Files], Raw]
    urls: dict[str, str]  # by the file's name
    sizes: dict[str, tuple[int, ...]]


def load_classification(
    name: str,
    source: Path | str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    official: bool = True,
    downloads: Path | str = "data",
) -> ClassificationData:
    """Read a set from a local copy, a directory or an archive of the official files, or fetch it.

    Args:
        validation: part of train that is carved out where there is no official validation split.
        official: whether the splits must have the official numbers of texts.
        downloads: where fetched files are kept, in a folder of the set's name.

    Raises:
        CorpusError: files that cannot be had, read or understood, or are not all there.
    """
    task = TASKS[name]
    files = Files.open(Path(source)) if source is not None else Files.fetch(task.urls, Path(downloads) / name)
    raw = task.read(files)
    found = tuple(len(part.texts) for part in (raw.train, raw.validation, raw.test) if part is not None)
    if official and found != task.sizes[raw.form]:
        raise CorpusError(
            f"{files.name}: {name} ({raw.form}) has {_numbers(task.sizes[raw.form])} texts, here are "
            f"{_numbers(found)}: get the official files again, or set data.official=false for another set like it"
        )
    notes = [f"from {raw.form}"]
    train, held_out = raw.train, raw.validation
    if held_out is None:
        train, held_out = carve(raw.train, validation, seed)
        notes.append(f"validation: {len(held_out.texts)} texts of the official train")
    seen = set(train.texts) | set(held_out.texts)
    repeated = sum(text in seen for text in raw.test.texts)
    if repeated:
        notes.append(f"{repeated} texts of test are also among those of train or validation, as published")
    data = ClassificationData(name, raw.classes, train, held_out, raw.test, notes)
    for split in ("train", "validation", "test"):
        _check(f"{files.name}: {name}, {split}", getattr(data, split), data.classes)
    return data


def carve(train: Examples, part: float, seed: int) -> tuple[Examples, Examples]:
    """Split off a part of each class: what is left, and what was split off, in the order of the file.

    Raises:
        CorpusError: the part leaves one of the two empty.
    """
    if not 0 < part < 1:
        raise CorpusError(f"the validation part must lie between 0 and 1, got {part}")

    def key(text: str) -> bytes:
        return hashlib.blake2b(f"{seed}/{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    chosen: set[str] = set()
    for label in sorted(set(train.labels)):
        texts = sorted({text for text, of in zip(*train, strict=True) if of == label}, key=key)
        chosen.update(texts[: max(1, round(part * len(texts)))])
    inside = [text in chosen for text in train.texts]
    if all(inside) or not any(inside):
        raise CorpusError(f"a validation part of {part} of {len(inside)} texts leaves nothing to learn from")
    return _where(train, [not held for held in inside]), _where(train, inside)


def subset(data: ClassificationData, most: int, seed: int) -> ClassificationData:
    """The set with at most so many texts in each split, drawn by a hash of the text; noted."""

    def smaller(examples: Examples) -> Examples:
        ranked = sorted(
            range(len(examples.texts)),
            key=lambda i: hashlib.blake2b(f"subset/{seed}/{i}/{examples.texts[i]}".encode()).digest(),
        )
        kept = set(ranked[:most])
        return _where(examples, [i in kept for i in range(len(examples.texts))])

    notes = [*data.notes, f"a subset: at most {most} texts of each split"]
    return replace(
        data,
        notes=notes,
        train=smaller(data.train),
        validation=smaller(data.validation),
        test=smaller(data.test),
    )


def _where(examples: Examples, keep: list[bool]) -> Examples:
    kept = [i for i, held in enumerate(keep) if held]
    return Examples([examples.texts[i] for i in kept], [examples.labels[i] for i in kept])


def _numbers(sizes: Iterable[int]) -> str:
    return " / ".join(f"{size:,}" for size in sizes)


def _check(where: str, examples: Examples, classes: tuple[str, ...]) -> None:
    if not examples.texts:
        raise CorpusError(f"{where}: no texts")
    for text, label in zip(*examples, strict=True):
        if not text.strip():
            raise CorpusError(f"{where}: a text is empty")
        if not 0 <= label < len(classes):
            raise CorpusError(f"{where}: label {label} is none of the {len(classes)} classes, for {text[:60]!r}")


# --- the Stanford Sentiment Treebank ---------------------------------------------------------------

FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
TWO = ("negative", "positive")
_LEAF = re.compile(r"\((\d) ([^()\s]+)\)")
_ROOT = re.compile(r"\((\d) ")
_ESCAPES = {"-LRB-": "(", "-RRB-": ")", "-lrb-": "(", "-rrb-": ")", r"\/": "/", r"\*": "*", "``": '"', "''": '"'}
_ESCAPE = re.compile("|".join(map(re.escape, _ESCAPES)))


def read_tree(line: str, where: str) -> tuple[str, int]:
    """The sentence of an s-expression, its brackets and quotes as people write them, and its label 0..4.

    Raises:
        CorpusError: if it is none.
    """
    root = _ROOT.match(line)
    leaves = _LEAF.findall(line)
    if root is None or not leaves or line.count("(") != line.count(")"):
        raise CorpusError(f"{where}: not a tree of the Stanford treebank: {line[:60]!r}")
    return _ESCAPE.sub(lambda match: _ESCAPES[match[0]], " ".join(word for _, word in leaves)), int(root[1])


def _trees(files: Files, name: str) -> Examples:
    lines = [line for line in files.text(name).splitlines() if line.strip()]
    pairs = [read_tree(line, f"{files.name}/{name}, line {number}") for number, line in enumerate(lines, 1)]
    return Examples([text for text, _ in pairs], [label for _, label in pairs])


def read_sst5(files: Files) -> Raw:
    """train.txt, dev.txt and test.txt of trees; the class is the root's."""
    train, dev, test = (_trees(files, f"{split}.txt") for split in ("train", "dev", "test"))
    return Raw(FIVE, train, dev, test, "the treebank")


def read_sst2(files: Files) -> Raw:
    """GLUE's tab-separated files, in either order of columns; or the trees, whose neutral sentences are left out."""
    if files.has("train.tsv"):
        return Raw(TWO, _glue(files, "train.tsv"), None, _glue(files, "dev.tsv"), "GLUE")
    raw = read_sst5(files)
    assert raw.validation is not None
    train, dev, test = (_polar(part) for part in (raw.train, raw.validation, raw.test))
    return Raw(TWO, train, dev, test, "the treebank")


def _polar(examples: Examples) -> Examples:
    kept = _where(examples, [label != 2 for label in examples.labels])
    return Examples(kept.texts, [int(label > 2) for label in kept.labels])


def _glue(files: Files, name: str) -> Examples:
    lines = files.text(name).splitlines()
    header = [column.strip().lower() for column in lines[0].split("\t")] if lines else []
    text = next((i for i, column in enumerate(header) if column in ("sentence", "content", "text")), None)
    if text is None or "label" not in header:
        raise CorpusError(
            f"{files.name}/{name}: expected a first line with the columns label and sentence, got {header}"
        )
    label = header.index("label")
    examples = Examples([], [])
    for number, line in enumerate(lines[1:], 2):
        columns = line.split("\t")
        if len(columns) != len(header) or columns[label].strip() not in ("0", "1"):
            raise CorpusError(
                f"{files.name}/{name}, line {number}: expected label 0 or 1 and a text, got {line[:60]!r}"
            )
        examples.texts.append(columns[text].strip())
        examples.labels.append(int(columns[label]))
    return examples


# --- BANKING77 -------------------------------------------------------------------------------------


def read_banking77(files: Files) -> Raw:
    """train.csv and test.csv with text and category; categories.json, where it is, orders the classes."""
    parts = {split: _banking(files, f"{split}.csv") for split in ("train", "test")}
    names = {category for part in parts.values() for _, category in part}
    classes = tuple(json.loads(files.text("categories.json"))) if files.has("categories.json") else tuple(sorted(names))
    unknown = sorted(names - set(classes))
    if unknown:
        raise CorpusError(f"{files.name}: categories.json lacks {unknown}")
    index = {name: number for number, name in enumerate(classes)}
    train, test = (
        Examples([text for text, _ in part], [index[category] for _, category in part]) for part in parts.values()
    )
    return Raw(classes, train, None, test, "the authors' repository")


def _banking(files: Files, name: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(files.text(name), newline=""))
    if reader.fieldnames is None or not {"text", "category"} <= set(reader.fieldnames):
        raise CorpusError(f"{files.name}/{name}: expected the columns text and category, got {reader.fieldnames}")
    rows = [(" ".join((row["text"] or "").split()), row["category"]) for row in reader]
    if any(category is None for _, category in rows):
        raise CorpusError(f"{files.name}/{name}: a line has no category")
    return rows


# --- IMDB ------------------------------------------------------------------------------------------

_REVIEW = re.compile(r"(?:^|/)(train|test)/(neg|pos)/(\d+)_(\d+)\.txt$")


def read_imdb(files: Files) -> Raw:
    """aclImdb/{train,test}/{pos,neg}/ID_RATING.txt; line breaks of the web pages become spaces."""
    found: dict[str, list[tuple[int, int, str]]] = {"train": [], "test": []}
    for path, content in files.matching(_REVIEW):
        match = _REVIEW.search(path)
        assert match is not None
        split, kind, number, rating = match[1], match[2], int(match[3]), int(match[4])
        if (rating > 5) != (kind == "pos"):
            raise CorpusError(f"{files.name}: {path} has rating {rating} among the {kind} reviews")
        text = " ".join(content.replace("<br />", " ").split())
        found[split].append((number, int(kind == "pos"), text))
    train, test = (
        Examples([text for _, _, text in sorted(rows)], [label for _, label, _ in sorted(rows)])
        for rows in found.values()
    )
    if not train.texts or not test.texts:
        raise CorpusError(f"{files.name}: no aclImdb/train/pos/ID_RATING.txt and the like in it")
    return Raw(TWO, train, None, test, "the official release")


_BANKING = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data"
TASKS: dict[str, Task] = {
    "sst2": Task(
        read_sst2,
        {"SST-2.zip": "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"},
        {"GLUE": (67_349, 872), "the treebank": (6_920, 872, 1_821)},
    ),
    "sst5": Task(
        read_sst5,
        {"trees.zip": "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"},
        {"the treebank": (8_544, 1_101, 2_210)},
    ),
    "imdb": Task(
        read_imdb,
        {"aclImdb_v1.tar.gz": "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"},
        {"the official release": (25_000, 25_000)},
    ),
    "banking77": Task(
        read_banking77,
        {name: f"{_BANKING}/{name}" for name in ("train.csv", "test.csv", "categories.json")},
        {"the authors' repository": (10_003, 3_080)},
    ),
}


def class_counts(examples: Examples, classes: tuple[str, ...]) -> dict[str, int]:
    """Texts of each class."""
    counts = Counter(examples.labels)
    return {name: counts[number] for number, name in enumerate(classes)}
