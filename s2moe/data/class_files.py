"""How files hold texts with a class: the Stanford treebank, GLUE, BANKING77, IMDB, and tables of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from s2moe.data.archives import Files
from s2moe.data.errors import CorpusError
from s2moe.data.tables import TABLES, read_columns
from s2moe.data.text_lines import lines_of, squeeze


class Examples(NamedTuple):
    """Texts and the number of each one's class, of equal length."""

    texts: list[str]
    labels: list[int]

    def where(self, keep: Sequence[bool]) -> Examples:
        """Those that are kept, in order."""
        kept = [i for i, held in enumerate(keep) if held]
        return Examples([self.texts[i] for i in kept], [self.labels[i] for i in kept])


class Raw(NamedTuple):
    """What the files hold: None for a split that has to be carved out of train."""

    classes: tuple[str, ...]
    train: Examples
    validation: Examples | None
    test: Examples | None
    form: str  # which of a set's official forms it is; of one's own the names of the files


# --- the Stanford Sentiment Treebank ---------------------------------------------------------------

FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
TWO = ("negative", "positive")
_LEAF = re.compile(r"\((\d) ([^()\s]+)\)", re.ASCII)  # a word may hold U+00A0 or U+3000
_ROOT = re.compile(r"\((\d) ", re.ASCII)
_BRANCHES = re.compile(r"[()\d\s]*", re.ASCII)
_ESCAPES = {"-LRB-": "(", "-RRB-": ")", "-lrb-": "(", "-rrb-": ")", r"\/": "/", r"\*": "*", "``": '"', "''": '"'}
_ESCAPE = re.compile("|".join(map(re.escape, _ESCAPES)))


def read_tree(line: str, where: str) -> tuple[str, int]:
    """The sentence of an s-expression, its brackets and quotes as people write them, and its label 0..4.

    Raises:
        CorpusError: if it is none.
    """
    root = _ROOT.match(line)
    leaves = _LEAF.findall(line)
    understood = _BRANCHES.fullmatch(_LEAF.sub("", line)) and line.count("(") == line.count(")")
    if root is None or not leaves or not understood:
        raise CorpusError(f"{where}: not a tree of the Stanford treebank: {line[:60]!r}")
    return _ESCAPE.sub(lambda match: _ESCAPES[match[0]], " ".join(word for _, word in leaves)), int(root[1])


def _trees(files: Files, name: str) -> Examples:
    lines = [(number, line) for number, line in enumerate(lines_of(files.text(name)), 1) if line.strip()]
    pairs = [read_tree(line, f"{files.name}/{name}, line {number}") for number, line in lines]
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
    assert raw.test is not None
    train, dev, test = (_polar(part) for part in (raw.train, raw.validation, raw.test))
    return Raw(TWO, train, dev, test, "the treebank")


def _polar(examples: Examples) -> Examples:
    kept = examples.where([label != 2 for label in examples.labels])
    return Examples(kept.texts, [int(label > 2) for label in kept.labels])


def _glue(files: Files, name: str) -> Examples:
    where, examples = f"{files.name}/{name}", Examples([], [])
    for number, (label, text) in read_columns(files.text(name), where, ("label",), ("sentence", "content", "text")):
        if label.strip() not in ("0", "1"):
            raise CorpusError(f"{where}, line {number}: expected label 0 or 1, got {label[:20]!r} for {text[:60]!r}")
        examples.texts.append(text.strip(" "))
        examples.labels.append(int(label))
    return examples


# --- BANKING77 -------------------------------------------------------------------------------------


def read_banking77(files: Files) -> Raw:
    """train.csv and test.csv with text and category; categories.json, where it is, orders the classes."""
    parts = {split: _banking(files, f"{split}.csv") for split in ("train", "test")}
    names = {category for part in parts.values() for _, category in part}
    classes = _categories(files) if files.has("categories.json") else tuple(sorted(names))
    unknown = sorted(names - set(classes))
    if unknown:
        raise CorpusError(f"{files.name}: categories.json lacks {unknown}")
    index = {name: number for number, name in enumerate(classes)}
    train, test = (
        Examples([text for text, _ in part], [index[category] for _, category in part]) for part in parts.values()
    )
    return Raw(classes, train, None, test, "the authors' repository")


def _banking(files: Files, name: str) -> list[tuple[str, str]]:
    rows = read_columns(files.text(name), f"{files.name}/{name}", ("text",), ("category",))
    return [(squeeze(text), category) for _, (text, category) in rows]


def _categories(files: Files) -> tuple[str, ...]:
    try:
        found = json.loads(files.text("categories.json"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{files.name}/categories.json is not JSON ({error}); get it again, or delete it") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CorpusError(f"{files.name}/categories.json is not a list of names; get it again, or delete it")
    return tuple(found)


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
        text = squeeze(content.replace("<br />", " "))
        found[split].append((number, int(kind == "pos"), text))
    train, test = (
        Examples([text for _, _, text in sorted(rows)], [label for _, label, _ in sorted(rows)])
        for rows in found.values()
    )
    if not train.texts or not test.texts:
        raise CorpusError(f"{files.name}: no aclImdb/train/pos/ID_RATING.txt and the like in it")
    return Raw(TWO, train, None, test, "the official release")


# --- one's own -------------------------------------------------------------------------------------

_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def read_own(source: Path, text: str = "text", label: str = "label") -> Raw:
    """train.csv and, where they are, validation.csv and test.csv, or .tsv, .jsonl; or one such file, which is train.

    Classes are the labels of train, in the order of numbers where all are, else of the alphabet.
    """
    if source.is_file() and source.suffix.lower() in TABLES:
        files = Files.of(str(source.parent), {source.name: source})
        names: dict[str, str | None] = {"train": source.name}
    else:
        files = Files.open(source)
        names = {split: _own(files, split) for split in _SPLITS}
    if names["train"] is None:
        raise CorpusError(f"{source} has no train.csv, train.tsv or train.jsonl; data.source=FILE takes a single file")
    columns = (text.lower(),), (label.lower(),)
    rows: dict[str, list[tuple[str, str]]] = {}
    for split, name in names.items():
        if name is not None:
            where = f"{files.name}/{name}"
            rows[split] = [
                (said, given.strip()) for _, (said, given) in read_columns(files.text(name), where, *columns)
            ]
    labels = {given for _, given in rows["train"]}
    numbers = all(re.fullmatch(r"-?[0-9]+", given) for given in labels)
    classes = tuple(sorted(labels, key=int) if numbers else sorted(labels))
    index = {given: number for number, given in enumerate(classes)}
    unknown = sorted({given for part in rows.values() for _, given in part} - labels)
    if unknown or "" in labels or len(classes) < 2:
        problem = "a label is empty" if "" in labels else "fewer than two classes"
        problem = f"labels that train has none of: {', '.join(unknown[:5])}" if unknown else problem
        raise CorpusError(f"{source}: {problem} (column {label!r}; another with data.label_column)")
    parts = {split: Examples([t for t, _ in part], [index[given] for _, given in part]) for split, part in rows.items()}
    form = ", ".join(name for name in names.values() if name is not None)
    return Raw(classes, parts["train"], parts.get("validation"), parts.get("test"), form)


def _own(files: Files, split: str) -> str | None:
    """The name of a split's file; None where there is none."""
    wanted = [f"{stem}{suffix}" for stem in _SPLITS[split] for suffix in TABLES]
    found = [name for name in wanted if files.has(name)]
    if len(found) > 1:
        raise CorpusError(f"{files.name}: {' and '.join(found)} are both {split}; leave one")
    return found[0] if found else None
