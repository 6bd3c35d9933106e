"""A prepared corpus: one memory-mapped file of token ids a split, and ``metadata.json``, written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2moe.data.errors import CorpusError
from s2moe.data.tokenizer_base import Tokenizer
from s2moe.data.tokenizers import load_tokenizer
from s2moe.places import DATA_PREP

FORMAT = 1
VERIFIED_BYTES = 1 << 30  # a split up to this size is compared with its checksum when it is opened: 0.1 s for 100 MB
CHUNK_TOKENS = 1 << 20
METADATA_FILE = "metadata.json"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitMetadata:
    """One split: its tokens, the symbols that a figure per symbol is divided by, and its file's sha256."""

    tokens: int
    symbols: int
    sha256: str


@dataclass(frozen=True)
class CorpusMetadata:
    """What is known about a corpus.

    ``symbol`` names the unit of ``SplitMetadata.symbols``: byte, character or word (<eos> included).
    ``source`` records where the text came from, with its length in bytes and sha256; ``request`` the
    arguments that decide the content, which a second preparation must repeat; ``command`` the command line;
    ``notes`` what must be said beside every figure.
    """

    name: str
    tokenizer: str
    vocab_size: int
    dtype: str
    symbol: str
    splits: dict[str, SplitMetadata]
    source: dict[str, Any]
    request: dict[str, Any]
    command: str
    notes: list[str] = field(default_factory=list)
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path, prepare: str | None = None) -> CorpusMetadata:
        """The metadata of a prepared directory; CorpusError with the remedy, ``prepare``, where there is none."""
        prepare = prepare or preparation_command(directory)
        try:
            values = json.loads((directory / METADATA_FILE).read_text(encoding="utf-8"))
            splits = {name: SplitMetadata(**split) for name, split in values.pop("splits").items()}
            metadata = cls(splits=splits, **values)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorpusError(f"{directory} is not a prepared corpus; prepare it with: {prepare}") from error
        except (OSError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise CorpusError(
                f"{directory / METADATA_FILE} cannot be read ({' '.join(str(error).split())}); "
                f"prepare the corpus again: {prepare} --force"
            ) from error
        if metadata.format != FORMAT:
            raise CorpusError(
                f"{directory} has format {metadata.format}, this version reads {FORMAT}; "
                f"prepare it again: {metadata.command} --force"
            )
        return metadata


class TokenStream(Sequence[int]):
    """One split's tokens ``[tokens]``, memory-mapped; indexing and slicing are numpy's.

    Args:
        symbols: what all of it counts in a figure per symbol.
        symbols_V: what each id counts, ``Tokenizer.symbols_V``.
        vocab_size: an id that is not below it is an error where it is read; None: any may be.
    """

    def __init__(
        self,
        name: str,
        tokens: NDArray[Any],
        symbols: int,
        path: Path | None = None,
        symbols_V: NDArray[np.int64] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.name = name
        self.tokens = tokens
        self.symbols = symbols
        self.path = path
        self._symbols_V, self._vocab_size = symbols_V, vocab_size
        self._opened = None if path is None else _signature(path)

    def require_unchanged(self) -> None:
        """Raise CorpusError unless the file is what was opened: reading one that was cut off kills the process."""
        if self.path is None:
            return
        try:
            now = _signature(self.path)
        except OSError as error:
            raise CorpusError(f"the data file {self.path} is gone ({error.strerror}): put it back as it was") from error
        if now != self._opened:
            raise CorpusError(
                f"the data file {self.path} has changed since it was opened: put it back as it was, "
                "or prepare the corpus again and start a new run"
            )

    def __len__(self) -> int:
        return int(self.tokens.size)

    def __getitem__(self, index: Any) -> Any:
        """As numpy's. CorpusError for an id beyond the vocabulary, which only a damaged file has."""
        ids = self.tokens[index]
        if self._vocab_size is not None and np.size(ids) and (largest := int(np.max(ids))) >= self._vocab_size:
            raise CorpusError(
                f"{self.path or self.name} has the id {largest}, which the vocabulary of {self._vocab_size} has not: "
                "the file is damaged; prepare the corpus again"
            )
        return ids

    def count_symbols(self, start: int, stop: int) -> int:
        """How many symbols the tokens ``start`` to ``stop - 1`` count in a figure per symbol."""
        ids = self[start:stop]
        return len(ids) if self._symbols_V is None else int(self._symbols_V[ids].sum())

    def tokens_within(self, symbols: int) -> int:
        """The length in tokens of the longest beginning that counts at most so many symbols."""
        if self._symbols_V is None:
            return min(symbols, len(self))
        counted = 0
        for start in range(0, len(self), CHUNK_TOKENS):
            counts = counted + np.cumsum(self._symbols_V[self[start : start + CHUNK_TOKENS]])
            if counts[-1] > symbols:
                return start + int(np.searchsorted(counts, symbols, side="right"))
            counted = int(counts[-1])
        return len(self)


class Corpus:
    """A prepared directory, opened for reading.

    Opening checks that every file has the length that the metadata says, which costs nothing; a split of at most
    1 GiB is compared with its checksum when it is first read. :meth:`verify` compares all, as preparing the same
    corpus again does.
    """

    def __init__(self, directory: Path, metadata: CorpusMetadata) -> None:
        self.directory = directory
        self.metadata = metadata
        self._verified: set[str] = set()

    @classmethod
    def open(cls, directory: str | os.PathLike[str], prepare: str | None = None) -> Corpus:
        """Open a directory that ``python -m data_prep`` wrote; CorpusError with the command that mends it.

        ``prepare`` is that command for a directory that is not there, where the caller knows it.
        """
        corpus = cls(Path(directory), CorpusMetadata.read(Path(directory), prepare))
        for name in corpus.metadata.splits:
            path, expected = corpus.path(name), corpus._bytes(name)
            actual = path.stat().st_size if path.is_file() else None
            if actual != expected:
                found = "is missing" if actual is None else f"has {actual} bytes instead of {expected}"
                raise corpus.damaged(f"{path.name} {found}")
        return corpus

    @property
    def name(self) -> str:
        return self.metadata.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.directory)
        if tokenizer.vocab_size != self.metadata.vocab_size or tokenizer.kind != self.metadata.tokenizer:
            raise self.damaged("its tokenizer is not the one its metadata names")
        return tokenizer

    def split(self, name: str) -> TokenStream:
        """The tokens of "train", "valid" or "test", opened read-only.

        Raises:
            CorpusError: there is no such split, or its file is not what was written.
        """
        if name not in self.metadata.splits:
            known = ", ".join(self.metadata.splits)
            raise CorpusError(f"{self.name} has no split {name!r}; it has {known}")
        if name not in self._verified and self._bytes(name) <= VERIFIED_BYTES:
            self._verify(name)
        tokens = np.memmap(self.path(name), dtype=self.metadata.dtype, mode="r")
        return TokenStream(
            name,
            tokens,
            self.metadata.splits[name].symbols,
            self.path(name),
            self.tokenizer.symbols_V,
            self.metadata.vocab_size,
        )

    def text_bytes(self, name: str) -> bytes:
        """A split's text, decoded again, as bytes (all of it in memory)."""
        return self.tokenizer.decode_bytes(self.split(name)[:])

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def verify(self) -> None:
        """Read every split and compare its sha256; CorpusError for a difference."""
        for name in self.metadata.splits:
            self._verify(name)
        _ = self.tokenizer

    def _verify(self, name: str) -> None:
        with self.path(name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.metadata.splits[name].sha256:
                raise self.damaged(f"{name}.bin has another checksum than when it was written")
        self._verified.add(name)

    def damaged(self, problem: str) -> CorpusError:
        """The error for a directory whose files do not fit together."""
        return CorpusError(f"{self.directory} is damaged: {problem}; prepare it again: {self.metadata.command} --force")

    def _bytes(self, name: str) -> int:
        return self.metadata.splits[name].tokens * np.dtype(self.metadata.dtype).itemsize


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def preparation_command(directory: str | os.PathLike[str]) -> str:
    """The command that prepares a directory, guessed from its name."""
    name = Path(directory).name
    known = ("text8", "enwik8", "wikitext103", "embedded")
    corpus = next((corpus for corpus in known if name.startswith(corpus)), "{" + ",".join((*known, "text")) + "}")
    return f"{DATA_PREP} {corpus} --out {directory}"
