"""SentencePiece subwords: trained on a corpus, or any given model, used so that text is recovered exactly."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import ArrayLike, NDArray
from sentencepiece import sentencepiece_model_pb2 as model_format

from s2moe.data.errors import CorpusError
from s2moe.data.tokenizer_base import (
    REPLACEMENT,
    Tokenizer,
    Tokens,
    as_bytes,
    as_text,
    count_characters,
    integer_ids,
    token_dtype,
)

MODEL_FILE = "sentencepiece.model"
SEGMENT_CHARACTERS = 4096  # a longer line is cut, as the library's time and memory grow with its sentence
TRAINING_SEGMENTS = 1_000_000
SEGMENT = rf"[^\n]{{0,{SEGMENT_CHARACTERS - 1}}}\n|[^\n]{{1,{SEGMENT_CHARACTERS}}}"
SPACE = "\u2581"  # how SentencePiece writes a space


class SentencePieceTokenizer(Tokenizer):
    """Subwords of a SentencePiece model.

    A model's own normalisation (folding characters and white space, a space put before each text) is
    switched off, because it would change the text that a figure per character is about. With
    ``byte_fallback``, which models trained here have, any text is then recovered exactly, with one exception:
    SentencePiece writes a space as U+2581, so a U+2581 in the text is read back as a space.
    """

    kind = "sentencepiece"
    symbol = "character"
    cut = "line"

    def __init__(self, model: bytes) -> None:
        parsed = model_format.ModelProto()
        try:
            parsed.ParseFromString(model)
            parsed.normalizer_spec.name = "identity"
            parsed.normalizer_spec.precompiled_charsmap = b""
            parsed.normalizer_spec.add_dummy_prefix = False
            parsed.normalizer_spec.remove_extra_whitespaces = False
            self.model: bytes = parsed.SerializeToString()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except Exception as error:  # protobuf's and the library's own types
            raise CorpusError(f"not a readable SentencePiece model: {' '.join(str(error).split())}") from error

    @classmethod
    def from_file(cls, path: str | Path) -> SentencePieceTokenizer:
        """A given ``.model`` file."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise CorpusError(f"cannot read the SentencePiece model {path}: {error.strerror}") from error
        except CorpusError as error:
            raise CorpusError(f"{path}: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str | bytes], vocab_size: int) -> SentencePieceTokenizer:
        """A unigram model of ``vocab_size`` pieces, 256 of them single bytes, from the training text.

        ``texts`` are pieces cut at line ends; at most a million of their lines, drawn at random, are used.
        """
        sentencepiece.set_random_generator_seed(0)
        trained = io.BytesIO()
        sentences = (segment.rstrip("\n") for text in texts for segment in segments(as_text(as_bytes(text))))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(sentence for sentence in sentences if sentence),
                model_writer=trained,
                model_type="unigram",
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                bos_id=-1,
                eos_id=-1,
                max_sentence_length=4 * SEGMENT_CHARACTERS,
                input_sentence_size=TRAINING_SEGMENTS,
                shuffle_input_sentence=True,
                num_threads=1,  # the sums of several threads differ from run to run
                minloglevel=2,
            )
        except RuntimeError as error:
            raise CorpusError(_training_problem(str(error), vocab_size)) from error
        return cls(exact_scores(trained.getvalue()))

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def unknown_id(self) -> int:
        """The id of the unknown piece, which no encoded text contains."""
        return int(self._processor.unk_id())

    def pieces(self) -> list[str]:
        """Each id's piece, as the model writes it (a space as U+2581, a byte as <0x0A>)."""
        return [str(self._processor.id_to_piece(index)) for index in range(self.vocab_size)]

    def encode(self, text: str | bytes) -> Tokens:
        pieces = list(segments(as_text(as_bytes(text))))
        arrays = [np.asarray(ids, dtype=np.int64) for ids in self._processor.encode(pieces)]
        ids = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        if (ids == self._processor.unk_id()).any():
            raise CorpusError(
                f"the SentencePiece model has no piece for {self._unknown(pieces, arrays)!r} and no byte "
                "fallback, so the text could not be recovered; train a model here (leave "
                "--sentencepiece-model out), or give one with byte fallback"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def _unknown(self, pieces: list[str], arrays: list[Any]) -> str:
        """The first stretch of text that became the unknown piece."""
        for piece, ids in zip(pieces, arrays, strict=True):
            for token, surface in zip(ids, self._processor.encode(piece, out_type=str), strict=True):
                if token == self._processor.unk_id():
                    return str(surface)
        return ""

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        return self.decode(ids).encode()

    def decode(self, ids: ArrayLike) -> str:
        array = integer_ids(ids)
        outside = (array < 0) | (array >= self.vocab_size)
        parts, start = [], 0
        for stop in [*np.flatnonzero(outside).tolist(), array.size]:
            parts.append(str(self._processor.decode(array[start:stop].tolist())))
            start = stop + 1
        return REPLACEMENT.join(parts)

    @cached_property
    def symbols_V(self) -> NDArray[np.int64]:
        """Characters of each piece; of a byte 1 where it begins a character. A control piece stands for no text."""
        look_up, silent = self._processor.id_to_piece, self._processor.is_control
        texts = (
            bytes([int(piece[3:5], 16)]) if self._processor.is_byte(index) else "" if silent(index) else piece
            for index, piece in enumerate(map(look_up, range(self.vocab_size)))
        )
        return np.array([count_characters(as_bytes(text)) for text in texts], dtype=np.int64)

    def save(self, directory: str | Path) -> list[Path]:
        path = Path(directory) / MODEL_FILE
        path.write_bytes(self.model)
        return [*super().save(directory), path]

    @classmethod
    def _load(cls, directory: Path, state: dict[str, Any]) -> SentencePieceTokenizer:
        return cls.from_file(directory / MODEL_FILE)


def segments(text: str) -> Iterator[str]:
    """A text in lines with their line ends, longer lines cut; joined they are the text."""
    return (match.group() for match in re.finditer(SEGMENT, text))


def exact_scores(model: bytes) -> bytes:
    """The model with scores in steps of 1/128, whose sums over a segment are exact in any floating-point type.

    So every program that reads the model finds the same pieces, also where the same ones in another order are as good.
    """
    parsed = model_format.ModelProto()
    parsed.ParseFromString(model)
    for piece in parsed.pieces:
        piece.score = round(128 * piece.score) / 128
    return bytes(parsed.SerializeToString())


def _training_problem(message: str, vocab_size: int) -> str:
    limit = re.search(r"too high.*<= (\d+)", message)
    if limit:
        return f"the corpus is too small for {vocab_size} pieces; give --vocab-size {limit.group(1)} or less"
    if re.search(r"smaller than required_chars|too small|required_chars", message):
        return f"{vocab_size} pieces cannot hold the 256 bytes and the corpus' characters; raise --vocab-size"
    return f"SentencePiece could not be trained: {' '.join(message.split())}"
