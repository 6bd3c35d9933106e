"""The steps that every corpus shares: is there one already, tokenise the splits, publish the directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.releases import progress_bar
from s2moe.data.corpus import METADATA_FILE, Corpus, CorpusMetadata
from s2moe.data.errors import CorpusError
from s2moe.data.tokenizer_base import Tokenizer
from s2moe.data.writer import CorpusWriter, RawText, is_corpus


@dataclass(frozen=True)
class Output:
    """Where a corpus goes, whether it may replace another, and the command line that is recorded with it."""

    directory: Path
    force: bool = False
    command: str = "a program"


@dataclass(frozen=True)
class RawCorpus:
    """A corpus before tokenisation; ``expected_tokens`` are published counts that must come out."""

    name: str
    splits: dict[str, RawText]
    tokenizer: Tokenizer
    source: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    expected_tokens: dict[str, int] = field(default_factory=dict)


def prepare(output: Output, request: dict[str, Any], make: Callable[[Path], RawCorpus]) -> Corpus:
    """Build a corpus, or find that the same one is there already.

    ``request`` holds every argument that decides the content; ``make`` gets an empty working directory.
    """
    ready = _already_prepared(output, request)
    if ready is not None:
        print(f"{ready.name} is already prepared in {output.directory}, checksums match; nothing to do")
        return ready
    with CorpusWriter(output.directory) as writer:
        raw = make(writer.workspace)
        for split, text in raw.splits.items():
            with progress_bar(f"tokenising {split}", text.size) as bar:
                writer.write_split(split, text.chunks(raw.tokenizer.cut), raw.tokenizer, bar.update)
        for split, expected in raw.expected_tokens.items():
            if writer.splits[split].tokens != expected:
                raise CorpusError(
                    f"the {split} split of {raw.name} comes to {writer.splits[split].tokens:,} tokens, "
                    f"published are {expected:,}; the source is another version or damaged, get it again"
                )
        corpus = writer.finish(raw.name, raw.tokenizer, raw.source, request, output.command, raw.notes)
    print(describe(corpus, output.directory))
    return corpus


def positional_splits(path: Path, size: int, held_out: int) -> dict[str, RawText]:
    """Train, validation and test in this order, the last two ``held_out`` bytes each."""
    valid, test = size - 2 * held_out, size - held_out
    return {
        "train": RawText(path, 0, valid),
        "valid": RawText(path, valid, test),
        "test": RawText(path, test, size),
    }


def describe(corpus: Corpus, directory: Path) -> str:
    """What was written, in a few lines."""
    metadata = corpus.metadata
    lines = [f"{metadata.name} in {directory}: {metadata.tokenizer} tokenizer, vocabulary {metadata.vocab_size:,}"]
    for name, split in metadata.splits.items():
        lines.append(f"  {name:5} {split.tokens:>13,} tokens {split.symbols:>13,} {metadata.symbol}s")
    return "\n".join([*lines, *(f"  note: {note}" for note in metadata.notes)])


def _already_prepared(output: Output, request: dict[str, Any]) -> Corpus | None:
    """The finished corpus of the same request, None if there is nothing; CorpusError for anything else."""
    directory = output.directory
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not is_corpus(directory):
        raise CorpusError(f"{output.directory} exists and is not a corpus; give another --out, or remove it")
    if output.force:
        return None
    if not (directory / METADATA_FILE).exists():
        raise CorpusError(f"{output.directory} is an incomplete corpus; give --force to prepare it again")
    metadata = CorpusMetadata.read(directory)
    asked = json.loads(json.dumps(request))
    if metadata.request != asked:
        keys = [key for key in {**metadata.request, **asked} if metadata.request.get(key) != asked.get(key)]
        changes = ", ".join(f"{key} {metadata.request.get(key)!r} there, {asked.get(key)!r} here" for key in keys)
        raise CorpusError(
            f"{output.directory} holds another corpus ({changes}); give another --out, or --force to replace it"
        )
    corpus = Corpus.open(directory)
    corpus.verify()
    return corpus
