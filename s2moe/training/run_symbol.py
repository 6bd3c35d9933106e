"""What the figures of a run are divided by, for commands that have its directory alone."""

from __future__ import annotations

from pathlib import Path

from s2moe.data import CorpusError
from s2moe.data.corpus import CorpusMetadata
from s2moe.data.tokenizers import TOKENIZERS
from s2moe.data.units import UNKNOWN_SYMBOL
from s2moe.hub.provenance import HF_DIRECTORY
from s2moe.hub.tokenization import tokenizer_fingerprint

from .run_directory import read_settings


def symbol_of_run(run: Path) -> str:
    """The symbol of a run's figures, as its exported tokenizer says, or its corpus; "symbol" where both are gone."""
    try:
        kind, _, _ = tokenizer_fingerprint(run / HF_DIRECTORY).partition(":")
        if kind in TOKENIZERS:
            return TOKENIZERS[kind].symbol
    except CorpusError:
        pass
    try:
        return CorpusMetadata.read(Path(read_settings(run)["data"]["dir"])).symbol
    except (CorpusError, OSError, ValueError, KeyError, TypeError):
        return UNKNOWN_SYMBOL
