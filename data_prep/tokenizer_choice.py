"""The tokenizer that the command line asks for, made from the corpus where it must be."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from s2moe.data.errors import CorpusError
from s2moe.data.library import library_tokenizer
from s2moe.data.subwords import SentencePieceTokenizer
from s2moe.data.tokenizer_base import Tokenizer
from s2moe.data.tokenizers import ByteTokenizer, CharacterTokenizer
from s2moe.data.writer import RawText

VOCABULARY = 8000


@dataclass(frozen=True)
class TokenizerChoice:
    """byte; character, of those that occur in the corpus; or sentencepiece.

    The last is trained on the training split with ``vocab_size`` pieces, or read from the file ``model``.
    """

    kind: Literal["byte", "character", "sentencepiece"] = "byte"
    vocab_size: int | None = None
    model: Path | None = None

    def __post_init__(self) -> None:
        if self.kind != "sentencepiece" and (self.vocab_size is not None or self.model is not None):
            raise CorpusError(
                f"--vocab-size and --sentencepiece-model do not apply to the {self.kind} tokenizer; "
                "leave them out, or give --tokenizer sentencepiece"
            )
        if self.vocab_size is not None and self.vocab_size < 1:
            raise CorpusError(f"--vocab-size must be at least 1, got {self.vocab_size}; the default is {VOCABULARY}")
        if self.vocab_size is not None and self.model is not None:
            raise CorpusError("a given --sentencepiece-model has its own vocabulary; leave --vocab-size out")

    def make(self, splits: Mapping[str, RawText]) -> Tokenizer:
        """The tokenizer for a corpus of these splits."""
        if self.kind == "byte":
            return ByteTokenizer()
        if self.kind == "character":
            pieces = (piece for text in splits.values() for piece in text.chunks(CharacterTokenizer.cut))
            return CharacterTokenizer.from_texts(pieces)
        if self.model is not None:
            given = SentencePieceTokenizer.from_file(self.model)
            library_tokenizer(given)  # refuses what a trained model could not be exported with
            return given
        training = splits["train"].chunks(SentencePieceTokenizer.cut)
        return SentencePieceTokenizer.train(training, self.vocab_size or VOCABULARY)

    def request(self) -> dict[str, Any]:
        """What decides the tokenizer: a model file counts by its content, not by its path."""
        if self.kind != "sentencepiece":
            return {"tokenizer": self.kind}
        if self.model is None:
            return {"tokenizer": self.kind, "vocab_size": self.vocab_size or VOCABULARY}
        try:
            digest = hashlib.sha256(self.model.read_bytes()).hexdigest()
        except OSError as error:
            raise CorpusError(f"cannot read the SentencePiece model {self.model}: {error.strerror}") from error
        return {"tokenizer": self.kind, "model_sha256": digest}


BYTES = TokenizerChoice()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--tokenizer and what belongs to it."""
    parser.add_argument(
        "--tokenizer",
        choices=("byte", "character", "sentencepiece"),
        default="byte",
        help="byte: vocabulary 256, takes anything (default); character: those that occur; "
        "sentencepiece: subwords, with single bytes for the rest",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"pieces of a SentencePiece model trained here (default {VOCABULARY})",
    )
    parser.add_argument(
        "--sentencepiece-model", type=Path, metavar="FILE", help="use this .model instead of training one"
    )


def from_arguments(arguments: argparse.Namespace) -> TokenizerChoice:
    """The choice that the command line makes."""
    return TokenizerChoice(arguments.tokenizer, arguments.vocab_size, arguments.sentencepiece_model)
