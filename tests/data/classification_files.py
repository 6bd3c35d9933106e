"""Small sets in the official formats of the classification tasks, made up."""

from __future__ import annotations

import csv
import io
import random
import tarfile
import zipfile
from pathlib import Path

GOOD, BAD = ("good", "fine", "superb", "lovely"), ("bad", "poor", "awful", "dull")


def sentence(generator: random.Random, positive: bool) -> str:
    """A few words that say which class it is."""
    words = generator.choices(GOOD if positive else BAD, k=3) + generator.choices(("film", "plot", "cast"), k=2)
    return " ".join(words) + f" {generator.randrange(10_000)}"


def tree(text: str, label: int) -> str:
    """An s-expression of the treebank, one branch a word."""
    words = text.split()
    inner = f"(2 {words[-1]})"
    for word in reversed(words[:-1]):
        inner = f"(2 (2 {word}) {inner})"
    return f"({label}" + inner[2:]


def treebank(directory: Path, sizes: tuple[int, int, int] = (30, 10, 12)) -> Path:
    """train.txt, dev.txt and test.txt of trees."""
    generator = random.Random(1)
    directory.mkdir(parents=True, exist_ok=True)
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        lines = []
        for number in range(size):
            label = number % 5
            lines.append(tree(sentence(generator, label > 2), label))
        (directory / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def glue(directory: Path, sizes: tuple[int, int] = (60, 12), swapped: bool = False) -> Path:
    """train.tsv and dev.tsv, and the test without labels that GLUE publishes."""
    generator = random.Random(2)
    directory.mkdir(parents=True, exist_ok=True)
    for split, size in zip(("train", "dev"), sizes, strict=True):
        rows = [("label", "content") if swapped else ("sentence", "label")]
        for number in range(size):
            pair = (sentence(generator, number % 2 == 1) + " ", str(number % 2))
            rows.append(pair[::-1] if swapped else pair)
        end = "\r\n" if swapped else "\n"
        text = end.join("\t".join(row) for row in rows) + end
        (directory / f"{split}.tsv").write_bytes(text.encode())
    (directory / "test.tsv").write_text("index\tsentence\n0\tunlabelled\n", encoding="utf-8")
    return directory


def banking(directory: Path, sizes: tuple[int, int] = (40, 12)) -> Path:
    """train.csv and test.csv with commas and quotes, of four intents."""
    generator = random.Random(3)
    directory.mkdir(parents=True, exist_ok=True)
    for split, size in zip(("train", "test"), sizes, strict=True):
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(("text", "category"))
        for number in range(size):
            writer.writerow((f'Where, "please", is {generator.randrange(10_000)}?\n', f"intent_{number % 4}"))
        (directory / f"{split}.csv").write_text(out.getvalue(), encoding="utf-8", newline="")
    (directory / "categories.json").write_text('["intent_3", "intent_2", "intent_1", "intent_0"]')
    return directory


def imdb(path: Path, form: str = "xz", train: int = 20, test: int = 8) -> Path:
    """A tar archive (of "gz" or "xz"), or a directory (of "")."""
    generator = random.Random(4)
    files = {"aclImdb/README": "about", "aclImdb/train/unsup/0_0.txt": "no class"}
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            positive = number % 2 == 1
            name = f"aclImdb/{split}/{'pos' if positive else 'neg'}/{number}_{9 if positive else 2}.txt"
            files[name] = f"A {sentence(generator, positive)}.<br /><br />The end."
    if not form:
        for name, text in files.items():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        return path
    with tarfile.open(path, f"w:{form}") as archive:
        for name, text in files.items():
            content = text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(directory: Path, folder: str) -> Path:
    """A directory's files in an archive, inside a folder, with the shadow files that some systems add."""
    path = directory.with_suffix(".archive")  # whatever its name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/", "")
        for file in sorted(directory.iterdir()):
            archive.write(file, f"{folder}/{file.name}")
            archive.writestr(f"__MACOSX/{folder}/{file.name}", "shadow")
    return path
