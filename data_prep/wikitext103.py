"""WikiText-103, word level: the split files as published, vocabulary of the training split, <eos> a line.

The data set: https://huggingface.co/datasets/Salesforce/wikitext (configuration wikitext-103-v1, whose rare
words are <unk>; the raw form has another vocabulary). The original archive, wikitext-103-v1.zip, is no longer
online. Both are recognised by the published number of tokens of each split.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.build import Output, RawCorpus, prepare
from data_prep.releases import BLOCK, existing, open_unpacked, spool
from data_prep.text import load_rows
from s2moe.data.corpus import Corpus
from s2moe.data.errors import CorpusError
from s2moe.data.words import WordTokenizer
from s2moe.data.writer import RawText

HELP = "WikiText-103, 267,735 words, published splits"
EPILOG = """\
examples:
  python -m data_prep wikitext103 --out data/wikitext103
  python -m data_prep wikitext103 --source wikitext-103-v1.zip --out data/wikitext103
  python -m data_prep wikitext103 --source ~/wikitext-103 --out data/wikitext103

--source is the official archive, or a directory with its wiki.{train,valid,test}.tokens; without it the
data set Salesforce/wikitext, wikitext-103-v1, is fetched. Perplexity is per token, <eos> included.
"""


@dataclass(frozen=True)
class WordRelease:
    """What was published: tokens of each split, one <eos> a line among them, and the vocabulary's size."""

    tokens: dict[str, int] = field(default_factory=lambda: {"train": 103_227_021, "valid": 217_646, "test": 245_569})
    vocab_size: int = 267_735
    dataset: str = "Salesforce/wikitext"
    config: str = "wikitext-103-v1"


RELEASE = WordRelease()
DATASET_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only this corpus has."""
    parser.add_argument("--source", metavar="PATH", help="the official .zip or its directory (default: download)")


def run(arguments: argparse.Namespace, output: Output) -> Corpus:
    """Prepare as the command line says."""
    return prepare_wikitext103(output, arguments.source)


def prepare_wikitext103(output: Output, source: str | Path | None = None, release: WordRelease = RELEASE) -> Corpus:
    """Prepare WikiText-103 from a local copy or the hub; CorpusError unless the published counts come out."""

    def make(workspace: Path) -> RawCorpus:
        local, splits, digests = existing(source), {}, {}
        for name in release.tokens:
            path = workspace / f"{name}.raw"
            blocks = _from_hub(release, name) if local is None else _from_copy(local, name)
            content = spool(blocks, path, f"reading {name}")
            splits[name] = RawText(path)
            digests[name] = content.sha256
        tokenizer = WordTokenizer.from_texts(splits["train"].chunks(WordTokenizer.cut))
        if tokenizer.vocab_size != release.vocab_size:
            raise CorpusError(
                f"the training split has {tokenizer.vocab_size:,} words, WikiText-103 has "
                f"{release.vocab_size:,}; the source is another version (such as the raw one) or damaged"
            )
        return RawCorpus(
            name="wikitext103",
            splits=splits,
            tokenizer=tokenizer,
            source={"dataset": release.dataset, "config": release.config, "sha256": digests},
            expected_tokens=release.tokens,
        )

    return prepare(output, {"corpus": "wikitext103"}, make)


def _from_hub(release: WordRelease, split: str) -> Iterator[bytes]:
    """The hub's rows are the file's lines, an empty line without its newline."""
    for row in load_rows(release.dataset, release.config, DATASET_SPLITS[split]):
        yield row["text"].rstrip("\n").encode() + b"\n"


def _from_copy(source: Path, split: str) -> Iterator[bytes]:
    name = f"wiki.{split}.tokens"
    if source.is_dir():
        found = sorted(source.rglob(name))
        if len(found) != 1:
            raise CorpusError(f"{source} holds {len(found) or 'no'} file {name}; give the unpacked archive's directory")
        source = found[0]
    elif not zipfile.is_zipfile(source):
        raise CorpusError(f"{source} is neither wikitext-103-v1.zip nor a directory with {name}; give one of them")
    with open_unpacked(source, name) as file:
        yield from iter(lambda: file.read(BLOCK), b"")
