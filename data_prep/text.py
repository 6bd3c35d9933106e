"""Any text: local text or JSONL files, or a data set of the Hugging Face hub, split by position."""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep import tokenizer_choice
from data_prep.build import Output, RawCorpus, prepare
from data_prep.formats import open_text
from data_prep.releases import BLOCK, spool
from data_prep.tokenizer_choice import BYTES, TokenizerChoice
from s2moe.data.corpus import Corpus
from s2moe.data.errors import CorpusError
from s2moe.data.tables import json_object
from s2moe.data.tokenizer_base import as_bytes
from s2moe.data.writer import RawText

FRACTIONS = (0.9, 0.05, 0.05)
HELP = "any text or JSONL files, or a data set of the Hugging Face hub"
EPILOG = """\
examples:
  python -m data_prep text --source book.txt --out data/book
  python -m data_prep text --source 'notes/**/*.md' --tokenizer character --out data/notes
  python -m data_prep text --source crawl-*.jsonl.gz --field text --tokenizer sentencepiece \\
      --vocab-size 16000 --out data/crawl
  python -m data_prep text --dataset roneneldan/TinyStories --out data/tinystories

Files are read in the order given, those of a glob sorted by name, each once; .gz, .xz, .bz2 and .zip are
unpacked. A file called *.jsonl, *.jsonlines, *.ndjson or *.json is one JSON object a line, its --field the
text. Text files are taken exactly but for a byte order mark; a newline is put after one that does not end
in it, where another follows. JSON and data set texts are separated by an empty line. Whatever is not text,
or is in UTF-16, is refused. The first 90% of the bytes train, then 5% validate, 5% test.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only this corpus has."""
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--source", nargs="+", metavar="FILE", help="text or JSONL files, or globs in quotes")
    origin.add_argument("--dataset", metavar="NAME", help="a data set of the Hugging Face hub, or its local directory")
    parser.add_argument("--config", metavar="NAME", help="the data set's configuration")
    parser.add_argument("--dataset-split", metavar="NAME", help="the data set's split to take (default: train)")
    parser.add_argument("--field", metavar="NAME", help="the field of JSON or a data set that holds the text (text)")
    parser.add_argument(
        "--fractions",
        nargs=3,
        type=float,
        default=FRACTIONS,
        metavar=("TRAIN", "VALID", "TEST"),
        help="parts of the text, by position (default: 0.9 0.05 0.05)",
    )
    tokenizer_choice.add_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> Corpus:
    """Prepare as the command line says."""
    if arguments.source and (arguments.config or arguments.dataset_split):
        raise CorpusError("--config and --dataset-split belong to --dataset; leave them out with --source")
    choice = tokenizer_choice.from_arguments(arguments)
    field = "text" if arguments.field is None else arguments.field
    if arguments.dataset:
        split = arguments.dataset_split or "train"
        return prepare_dataset(
            output,
            arguments.dataset,
            arguments.config,
            split,
            field,
            choice,
            tuple(arguments.fractions),
        )
    if arguments.field is not None and not any(is_json(path) for path in expand(arguments.source)):
        raise CorpusError("--field names a field of JSON lines, and these are text files; leave it out")
    return prepare_files(output, arguments.source, field, choice, tuple(arguments.fractions))


def prepare_files(
    output: Output,
    sources: Sequence[str],
    field: str = "text",
    tokenizer: TokenizerChoice = BYTES,
    fractions: Sequence[float] = FRACTIONS,
) -> Corpus:
    """Prepare local files; ``sources`` are paths or globs; train, valid, test ``fractions`` sum to 1."""
    request = {
        "corpus": "text",
        "source": [os.path.abspath(source) for source in sources],
        "files": state_of(expand(sources)),
        "field": field,
    }

    def blocks() -> Iterator[bytes]:
        return read_files(expand(sources), field)

    return _prepare(output, request, blocks, tokenizer, fractions, {"files": list(sources)})


def prepare_dataset(
    output: Output,
    name: str,
    config: str | None = None,
    split: str = "train",
    field: str = "text",
    tokenizer: TokenizerChoice = BYTES,
    fractions: Sequence[float] = FRACTIONS,
) -> Corpus:
    """Prepare one split of a data set that ``datasets.load_dataset`` knows."""
    request = {"corpus": "text", "dataset": name, "config": config, "dataset_split": split, "field": field}

    def blocks() -> Iterator[bytes]:
        return separated(row_text(row, field, f"row {i}") for i, row in enumerate(load_rows(name, config, split)))

    return _prepare(output, request, blocks, tokenizer, fractions, {"dataset": name, "config": config, "split": split})


def _prepare(
    output: Output,
    request: dict[str, Any],
    blocks: Any,
    tokenizer: TokenizerChoice,
    fractions: Sequence[float],
    source: dict[str, Any],
) -> Corpus:
    if len(fractions) != 3 or not all(part > 0 for part in fractions) or not abs(sum(fractions) - 1) <= 1e-6:
        raise CorpusError(f"--fractions {' '.join(map(str, fractions))}: they must be above 0 and sum to 1")

    def make(workspace: Path) -> RawCorpus:
        path = workspace / "raw"
        content = spool(blocks(), path, "reading text")
        if is_blank(path):
            raise CorpusError("there is no text in it: nothing, or white space alone; look at what was given")
        valid = next_character(path, int(content.bytes * fractions[0]))
        test = next_character(path, int(content.bytes * (fractions[0] + fractions[1])))
        splits = {
            "train": RawText(path, 0, valid),
            "valid": RawText(path, valid, test),
            "test": RawText(path, test, content.bytes),
        }
        for name, text in splits.items():
            if text.start == text.stop:
                raise CorpusError(
                    f"{content.bytes} bytes of text leave the {name} split empty; give more text, or other --fractions"
                )
        return RawCorpus(
            name=output.directory.resolve().name,
            splits=splits,
            tokenizer=tokenizer.make(splits),
            source=content.record(**source),
        )

    return prepare(output, {**request, "fractions": list(fractions), **tokenizer.request()}, make)


def expand(sources: Iterable[str]) -> list[Path]:
    """Paths and globs as existing files, in order, each once, whatever names it has."""
    files: dict[tuple[int, int], Path] = {}
    for source in sources:
        found = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        matching = [Path(name) for name in found if not os.path.isdir(name)]
        if not matching:
            hint = f"give a glob in quotes, such as '{source}/**/*.txt'" if found else "check the path"
            raise CorpusError(f"no file matches {source}; {hint}")
        for path in matching:
            stat = path.stat()
            files.setdefault((stat.st_dev, stat.st_ino), path)
    return list(files.values())


def state_of(files: Sequence[Path]) -> str:
    """What changes when a file does: number and bytes of the files, and a digest of their sizes and times."""
    found = [file.stat() for file in files]
    digest = hashlib.sha256(repr([(stat.st_size, stat.st_mtime_ns) for stat in found]).encode())
    return f"{len(found)} of {sum(stat.st_size for stat in found):,} bytes, sizes and times {digest.hexdigest()[:12]}"


def read_files(paths: Sequence[Path], field: str) -> Iterator[bytes]:
    """The text of all files in pieces, JSON lines reduced to their field."""
    ended = True
    for path in paths:
        if not ended:
            yield b"\n"
        for block in read_file(path, field):
            yield block
            ended = block.endswith(b"\n") if block else ended


def read_file(path: Path, field: str) -> Iterator[bytes]:
    """One file's text in pieces."""
    with open_text(path) as (file, is_json):
        if is_json:
            numbered = ((f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip())
            yield from separated(row_text(json_object(line, where), field, where) for where, line in numbered)
        else:
            yield from iter(lambda: file.read(BLOCK), b"")


def is_json(path: Path) -> bool:
    """Whether a file, or what is packed in it, is JSON lines."""
    with open_text(path) as (_, found):
        return found


def row_text(row: dict[str, Any], field: str, where: str) -> bytes:
    """The text of one JSON or data set row."""
    if field not in row:
        raise CorpusError(
            f"{where} has no field {field!r} (its fields: {', '.join(row) or 'none'}); name another with --field"
        )
    if not isinstance(row[field], str):
        shown = "null" if row[field] is None else repr(row[field])[:40]
        raise CorpusError(f"{where}: the field {field!r} is {shown}, not a text; take the line out, or give it a text")
    return as_bytes(row[field])


def is_blank(path: Path) -> bool:
    """Whether a file holds nothing but white space."""
    with path.open("rb") as file:
        return not any(block.strip() for block in iter(lambda: file.read(BLOCK), b""))


def separated(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Texts, each ended by an empty line."""
    for text in texts:
        yield text.rstrip(b"\n") + b"\n\n"


def load_rows(name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a data set, streamed."""
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the library, its file formats and its http client raise many types
        reason = " ".join(str(error).split())
        raise CorpusError(
            f"cannot load the data set {name} ({type(error).__name__}: {reason}); "
            "check its name, --config, --dataset-split and the network"
        ) from error


def next_character(path: Path, offset: int) -> int:
    """``offset``, moved forward if it lies within a UTF-8 character."""
    with path.open("rb") as file:
        file.seek(offset)
        following = file.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
