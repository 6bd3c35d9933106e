"""Real English text that every Python carries: the language reference as ``help()`` shows it.

``pydoc_data.topics`` (PSF licence), its values joined by newlines in sorted key order, split 90 / 5 / 5
percent by position. It differs from one Python version to the next, so version and sha256 go with the corpus.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from pydoc_data.topics import topics

from data_prep import tokenizer_choice
from data_prep.build import Output, RawCorpus, prepare
from data_prep.docstrings import honest, library_docstrings
from data_prep.releases import spool
from data_prep.text import next_character
from data_prep.tokenizer_choice import BYTES, TokenizerChoice
from s2moe.data.corpus import Corpus
from s2moe.data.writer import RawText

HELP = "English text inside Python itself: no network, no download"
EPILOG = """\
examples:
  python -m data_prep embedded --out data/embedded
  python -m data_prep embedded --docstrings --out data/embedded-docstrings

The text is Python's language reference as help() shows it, about 465,000 characters: validation is its last
twentieth but one, test its last twentieth. --docstrings puts the standard library's docstrings (about
1.8 million characters more) before the training text and leaves the held-out texts as they are;
docstrings that share a long line with those are left out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only this corpus has."""
    parser.add_argument(
        "--docstrings",
        action="store_true",
        help="add the standard library's docstrings to the training split",
    )
    tokenizer_choice.add_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> Corpus:
    """Prepare as the command line says."""
    return prepare_embedded(output, arguments.docstrings, tokenizer_choice.from_arguments(arguments))


def prepare_embedded(output: Output, docstrings: bool = False, tokenizer: TokenizerChoice = BYTES) -> Corpus:
    """Prepare the text of the Python that runs this."""

    def make(workspace: Path) -> RawCorpus:
        reference = workspace / "reference"
        content = spool([topics_text()], reference, "reading pydoc_data.topics")
        valid = next_character(reference, content.bytes * 90 // 100)
        test = next_character(reference, content.bytes * 95 // 100)
        splits = {
            "train": RawText(reference, 0, valid),
            "valid": RawText(reference, valid, test),
            "test": RawText(reference, test, content.bytes),
        }
        source = content.record(text="pydoc_data.topics", python=platform.python_version())
        if docstrings:
            text = reference.read_bytes()
            kept = honest(library_docstrings(), text[valid:].decode())
            added = [docstring.encode("utf-8", "replace") + b"\n\n" for docstring in kept]
            training = workspace / "training"
            extended = spool([*added, text[:valid]], training, "reading docstrings")
            splits["train"] = RawText(training)
            source["docstrings"] = {
                "count": len(added),
                "bytes": extended.bytes - valid,
                "training_sha256": extended.sha256,
            }
        name = "embedded-docstrings" if docstrings else "embedded"
        return RawCorpus(name, splits, tokenizer.make(splits), source)

    request = {
        "corpus": "embedded",
        "docstrings": docstrings,
        "python": platform.python_version(),
        **tokenizer.request(),
    }
    return prepare(output, request, make)


def topics_text() -> bytes:
    """The whole reference text, UTF-8."""
    return "\n".join(topics[key] for key in sorted(topics)).encode()
