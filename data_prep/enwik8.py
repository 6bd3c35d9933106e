"""enwik8: the first 100,000,000 bytes of an English Wikipedia dump, split 90M / 5M / 5M by position.

The release and its checksum: http://mattmahoney.net/dc/textdata.html. The text stays raw bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.build import Output, RawCorpus, positional_splits, prepare
from data_prep.releases import Release, check_release, existing, obtain
from s2moe.data.corpus import Corpus
from s2moe.data.tokenizer_base import Tokenizer
from s2moe.data.tokenizers import ByteTokenizer, ReducedByteTokenizer
from s2moe.data.writer import RawText

RELEASE = Release(
    name="enwik8",
    url="http://mattmahoney.net/dc/enwik8.zip",
    size=100_000_000,
    md5="a1fa5ffddb56f4953e226637dabbb36a",
    held_out=5_000_000,
)
HELP = "enwik8, bytes, 90M / 5M / 5M"
EPILOG = """\
examples:
  python -m data_prep enwik8 --out data/enwik8
  python -m data_prep enwik8 --source ~/downloads/enwik8.xz --out data/enwik8
  python -m data_prep enwik8 --legacy-enwik8 txl --out data/enwik8-txl

Vocabulary 256; every byte is a token and counts in bits per character. The two legacy forms score other
symbols, so their figures compare with the papers of their lineage only:
  txl  newline bytes vanish (Transformer-XL): 204 symbols, 4,943,417 of the 5,000,000 test bytes are scored
  awd  a newline is the token <eos>, also after an unfinished last line of a split (AWD-LSTM, SMoE
       lineage): 205 symbols
"""
LEGACY_NOTES = {
    "txl": "newline bytes are dropped and not scored (Transformer-XL's protocol)",
    "awd": "newlines are <eos>, one added after a split's unfinished last line (AWD-LSTM's protocol)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only this corpus has."""
    parser.add_argument(
        "--source", metavar="FILE", help="a local copy: plain, .zip, .xz, .gz or .bz2 (default: download)"
    )
    parser.add_argument("--legacy-enwik8", choices=("txl", "awd"), help="an older protocol's symbols, see below")


def run(arguments: argparse.Namespace, output: Output) -> Corpus:
    """Prepare as the command line says."""
    return prepare_enwik8(output, arguments.source, arguments.legacy_enwik8)


def prepare_enwik8(
    output: Output,
    source: str | Path | None = None,
    legacy: Literal["txl", "awd"] | None = None,
    release: Release = RELEASE,
) -> Corpus:
    """Prepare enwik8 from a local copy or the official place; CorpusError for wrong content."""

    def make(workspace: Path) -> RawCorpus:
        path, local = workspace / "raw", existing(source)
        content = obtain(release, local, path)
        check_release(release, content, local)
        splits = positional_splits(path, release.size, release.held_out)
        tokenizer: Tokenizer = ByteTokenizer()
        if legacy is not None:
            alphabet = occurring_bytes(RawText(path).chunks("byte"))
            tokenizer = ReducedByteTokenizer(alphabet, "drop" if legacy == "txl" else "eos")
        if legacy == "awd":
            splits = {name: _with_final_newline(text) for name, text in splits.items()}
        return RawCorpus(
            name=release.name if legacy is None else f"{release.name}-{legacy}",
            splits=splits,
            tokenizer=tokenizer,
            source=content.record(url=release.url, md5=content.md5),
            notes=[LEGACY_NOTES[legacy]] if legacy else [],
        )

    return prepare(output, {"corpus": release.name, "legacy_enwik8": legacy}, make)


def occurring_bytes(pieces: Iterable[bytes]) -> bytes:
    """The distinct bytes of a text, sorted."""
    counts = sum(np.bincount(np.frombuffer(piece, dtype=np.uint8), minlength=256) for piece in pieces)
    return bytes(np.flatnonzero(counts).tolist())


def _with_final_newline(text: RawText) -> RawText:
    with text.path.open("rb") as file:
        file.seek((text.stop or 0) - 1)
        finished = file.read(1) == b"\n"
    return text if finished else RawText(text.path, text.start, text.stop, suffix=b"\n")
