"""text8: 100,000,000 characters a-z and space made from English Wikipedia, split 90M / 5M / 5M by position.

The release and its checksum: http://mattmahoney.net/dc/textdata.html.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.build import Output, RawCorpus, positional_splits, prepare
from data_prep.releases import Content, Release, check_release, existing, obtain
from data_prep.text import state_of
from s2moe.data.corpus import Corpus
from s2moe.data.errors import CorpusError
from s2moe.data.tokenizers import TEXT8_ALPHABET, CharacterTokenizer

RELEASE = Release(
    name="text8",
    url="http://mattmahoney.net/dc/text8.zip",
    size=100_000_000,
    md5="3bea1919949baf155f99411df5fada7e",
    held_out=5_000_000,
)
HELP = "text8, 27 characters, 90M / 5M / 5M"
EPILOG = """\
examples:
  python -m data_prep text8 --out data/text8
  python -m data_prep text8 --source ~/downloads/text8.zip --out data/text8
  python -m data_prep text8 --source text8_first_74000000.xz --allow-partial --out data/text8-74M

A shorter copy is refused, because neither text8's checksum nor its splits can be had from it. With
--allow-partial it becomes a corpus of another name (text8-74M), its last 2 x 5M characters held out;
figures on it do not compare with text8's.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only this corpus has."""
    parser.add_argument(
        "--source", metavar="FILE", help="a local copy: plain, .zip, .xz, .gz or .bz2 (default: download)"
    )
    parser.add_argument("--allow-partial", action="store_true", help="accept a shorter copy, under another name")


def run(arguments: argparse.Namespace, output: Output) -> Corpus:
    """Prepare as the command line says."""
    if arguments.allow_partial and arguments.source is None:
        raise CorpusError("--allow-partial is about a local copy: give it with --source, or leave --allow-partial out")
    return prepare_text8(output, arguments.source, arguments.allow_partial)


def prepare_text8(
    output: Output, source: str | Path | None = None, allow_partial: bool = False, release: Release = RELEASE
) -> Corpus:
    """Prepare text8, or from the beginning of it a corpus named after its length."""

    def make(workspace: Path) -> RawCorpus:
        path, local = workspace / "raw", existing(source)
        content = obtain(release, local, path)
        partial = local is not None and content.bytes < release.size
        name, notes = release.name, []
        if partial:
            name = f"{release.name}-{short_count(content.bytes)}"
            _check_partial(release, content, local, name, allow_partial)
            notes.append(f"the first {content.bytes:,} of {release.name}'s {release.size:,} characters: not text8")
        else:
            check_release(release, content, local)
        return RawCorpus(
            name=name,
            splits=positional_splits(path, content.bytes, release.held_out),
            tokenizer=CharacterTokenizer(TEXT8_ALPHABET),
            source=content.record(url=release.url, md5=content.md5),
            notes=notes,
        )

    request: dict[str, Any] = {"corpus": release.name, "allow_partial": allow_partial}
    local = existing(source)
    if allow_partial and local is not None:  # no checksum says what it holds
        request |= {"copy": state_of([local])}
    return prepare(output, request, make)


def _check_partial(release: Release, content: Content, source: Path | None, name: str, allowed: bool) -> None:
    held = short_count(release.held_out)
    if content.bytes <= 2 * release.held_out:
        raise CorpusError(
            f"{source} holds {content.bytes:,} characters, too few to hold out {held} "
            f"for validation and {held} for test; get {release.url}"
        )
    if not allowed:
        train = short_count(content.bytes - 2 * release.held_out)
        raise CorpusError(
            f"{source} holds {content.bytes:,} of {release.name}'s {release.size:,} characters, so neither "
            f"its checksum nor its split can be had; get {release.url}, or give --allow-partial to prepare "
            f"it as {name}, split {train}/{held}/{held}"
        )


def short_count(count: int) -> str:
    """74000000 as 74M; a count that is not whole millions as it is."""
    millions, rest = divmod(count, 1_000_000)
    return str(count) if rest or not millions else f"{millions}M"
