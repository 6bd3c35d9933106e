"""Texts with a class, for fine-tuning: SST-2, SST-5, IMDB and BANKING77, from their official files, and one's own.

Every set has three splits that share no role: the model learns from `train`, the best epoch is chosen on
`validation`, and `test` is looked at once, at the end.

    set        test                         validation
    sst5       the treebank's test          the treebank's dev
    sst2       the treebank's test          the treebank's dev     (from trees: sentences, label 2 left out)
    sst2       GLUE's dev                   part of train          (from GLUE's files: test has no labels there)
    imdb       the official test            part of train
    banking77  the official test            part of train
    own        test.csv or part of train    validation.csv or part of train    (or .tsv, .jsonl)

What is carved out of train is drawn within each class by a hash of the text, so that it does not depend on the
order of the file, and all copies of a text fall on the same side.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from s2moe.data.archives import Files
from s2moe.data.class_files import Examples, Raw, read_banking77, read_imdb, read_own, read_sst2, read_sst5
from s2moe.data.errors import CorpusError

OWN = "own"  # the task whose files are the user's


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
    columns: tuple[str, str] = ("text", "label"),
) -> ClassificationData:
    """Read a set from a local copy, a directory or an archive of the official files, or fetch it.

    Args:
        source: with ``name`` "own" one's own files, or a single one, see :func:`read_own`.
        validation: part of train that is carved out for each of validation and test that there is no file of.
        official: whether the splits must have the official numbers of texts.
        downloads: where fetched files are kept, in a folder of the set's name.
        columns: of one's own files, those that hold the text and its class.

    Raises:
        CorpusError: files that cannot be had, read or understood, or are not all there.
    """
    if name == OWN:
        if source is None:
            raise CorpusError("data.task=own: say where your files are with data.source=DIRECTORY")
        where, raw = str(source), read_own(Path(source), *columns)
        name, whose = Path(source).resolve().stem, "train"
        notes = [f"own files: {raw.form}"]
    else:
        task = TASKS[name]
        files = Files.open(Path(source)) if source is not None else Files.fetch(task.urls, Path(downloads) / name)
        where, raw = files.name, task.read(files)
        if official:
            _check_sizes(f"{where}: {name} ({raw.form})", raw, task.sizes[raw.form])
        notes = [f"from {raw.form}" if official else f"in the format of {raw.form}, not checked to be its texts"]
        whose = "the official train" if official else "train"
    train, test, held_out = raw.train, raw.test, raw.validation
    if test is None:
        train, test = carve(train, validation, seed + 1)
        notes.append(f"test: {len(test.texts)} texts of {whose}")
    if held_out is None:
        train, held_out = carve(train, validation, seed)
        notes.append(f"validation: {len(held_out.texts)} texts of {whose}")
    seen = set(train.texts) | set(held_out.texts)
    repeated = sum(text in seen for text in test.texts)
    if repeated:
        notes.append(
            f"{repeated} texts of test are also among those of train or validation" + ", as published" * official
        )
    data = ClassificationData(name, raw.classes, train, held_out, test, notes)
    for split in ("train", "validation", "test"):
        _check(f"{where}: {name}, {split}", getattr(data, split), data.classes)
    return data


def _check_sizes(where: str, raw: Raw, expected: tuple[int, ...]) -> None:
    found = tuple(len(part.texts) for part in (raw.train, raw.validation, raw.test) if part is not None)
    if found != expected:
        raise CorpusError(
            f"{where} has {_numbers(expected)} texts, here are {_numbers(found)}: get the official files again, or set "
            "data.official=false for another set like it (data.task=own takes any texts and classes)"
        )


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
    return train.where([not held for held in inside]), train.where(inside)


def subset(data: ClassificationData, most: int, seed: int) -> ClassificationData:
    """The set with at most so many texts in each split, drawn by a hash of the text; noted."""

    def smaller(examples: Examples) -> Examples:
        ranked = sorted(
            range(len(examples.texts)),
            key=lambda i: hashlib.blake2b(f"subset/{seed}/{i}/{examples.texts[i]}".encode()).digest(),
        )
        kept = set(ranked[:most])
        return examples.where([i in kept for i in range(len(examples.texts))])

    notes = [*data.notes, f"a subset: at most {most} texts of each split"]
    return replace(
        data,
        notes=notes,
        train=smaller(data.train),
        validation=smaller(data.validation),
        test=smaller(data.test),
    )


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
