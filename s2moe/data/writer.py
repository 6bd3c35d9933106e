"""Write a corpus directory: tokens split by split, its tokenizer, and last of all its metadata."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from s2moe.data.corpus import METADATA_FILE, SPLITS, Corpus, CorpusMetadata, SplitMetadata
from s2moe.data.errors import CorpusError
from s2moe.data.publishing import LOCK_FILE, AtomicDirectory, remove
from s2moe.data.subwords import MODEL_FILE
from s2moe.data.tokenizer_base import TOKENIZER_FILE, Tokenizer, as_bytes, token_dtype
from s2moe.data.words import VOCABULARY_FILE

CHUNK_BYTES = 1 << 23
CORPUS_FILES = {
    *(f"{split}.bin" for split in SPLITS),
    METADATA_FILE,
    TOKENIZER_FILE,
    MODEL_FILE,
    VOCABULARY_FILE,
    LOCK_FILE,
}


@dataclass(frozen=True)
class RawText:
    """Bytes ``start`` to ``stop`` of a file (to its end if None), followed by ``suffix``."""

    path: Path
    start: int = 0
    stop: int | None = None
    suffix: bytes = b""

    @property
    def size(self) -> int:
        """Length in bytes."""
        stop = self.path.stat().st_size if self.stop is None else self.stop
        return stop - self.start + len(self.suffix)

    def chunks(self, cut: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The text in pieces of about ``size`` bytes, cut at a "byte", "character" or "line" boundary."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            remaining = self.size - len(self.suffix)
            held = b""
            while remaining:
                piece = file.read(min(size, remaining))
                if not piece:
                    raise CorpusError(f"{self.path} became shorter while it was read; try again")
                remaining -= len(piece)
                held += piece
                end = boundary(held, cut) if remaining else len(held)
                if end:
                    yield held[:end]
                held = held[end:]
            if self.suffix:
                yield self.suffix


def boundary(piece: bytes, cut: str) -> int:
    """The last place where ``piece`` may be cut; a line without end is cut between characters."""
    if cut == "byte":
        return len(piece)
    if cut == "line" and b"\n" in piece:
        return piece.rindex(b"\n") + 1
    end = len(piece)
    for back in range(1, min(4, len(piece)) + 1):  # find the start of the last character, which may be incomplete
        if piece[-back] & 0xC0 != 0x80:
            end = len(piece) - back
            break
    return end


class CorpusWriter:
    """Use as ``with CorpusWriter(directory) as writer``: ``write_split`` for each split, then ``finish``.

    ``workspace`` may hold working files meanwhile; only the corpus' own are kept.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._target = AtomicDirectory(directory)
        self.splits: dict[str, SplitMetadata] = {}
        self.directory = self._target.directory
        self.workspace = self._target.workspace

    def __enter__(self) -> Self:
        self._target.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._target.__exit__(kind, value, trace)

    def write_split(
        self,
        name: str,
        pieces: Iterable[bytes],
        tokenizer: Tokenizer,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Encode a split's text, given in pieces cut where the tokenizer allows.

        ``progress`` is called with the bytes of each piece done.
        """
        dtype = token_dtype(tokenizer.vocab_size)
        digest, tokens, symbols = hashlib.sha256(), 0, 0
        with (self.workspace / f"{name}.bin").open("wb") as file:
            for piece in pieces:
                ids = tokenizer.encode(piece).astype(dtype, copy=False)
                data = ids.tobytes()
                file.write(data)
                digest.update(data)
                tokens += ids.size
                symbols += tokenizer.count_symbols(ids)
                if progress is not None:
                    progress(len(piece))
        if not tokens:
            raise CorpusError(f"the {name} split is empty; give more text")
        self.splits[name] = SplitMetadata(tokens, symbols, digest.hexdigest())

    def finish(
        self,
        name: str,
        tokenizer: Tokenizer,
        source: dict[str, Any],
        request: dict[str, Any],
        command: str,
        notes: Iterable[str] = (),
    ) -> Corpus:
        """Write tokenizer and metadata, and move the directory into place (replacing an earlier corpus)."""
        for path in self.workspace.iterdir():
            if path.name not in CORPUS_FILES:
                remove(path)
        tokenizer.save(self.workspace)
        metadata = CorpusMetadata(
            name=name,
            tokenizer=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            dtype=token_dtype(tokenizer.vocab_size).name,
            symbol=tokenizer.symbol,
            splits=self.splits,
            source=source,
            request=request,
            command=command,
            notes=list(notes),
        )
        (self.workspace / METADATA_FILE).write_text(metadata.to_json(), encoding="utf-8")
        self._target.publish(is_corpus)
        return Corpus.open(self.directory)


def is_corpus(directory: Path) -> bool:
    """Whether a directory holds corpus files only, so that replacing it loses nothing else."""
    return directory.is_dir() and {path.name for path in directory.iterdir()} <= CORPUS_FILES


def write_corpus(
    directory: str | os.PathLike[str], name: str, splits: Mapping[str, str | bytes], tokenizer: Tokenizer
) -> Corpus:
    """Write small texts held in memory as a corpus: ``{"train": ..., "valid": ..., "test": ...}``."""
    texts = {split: as_bytes(text) for split, text in splits.items()}
    whole = b"".join(texts.values())
    source = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    with CorpusWriter(directory) as writer:
        for split, text in texts.items():
            writer.write_split(split, [text], tokenizer)
        return writer.finish(name, tokenizer, source, request={}, command="the program that wrote it")
