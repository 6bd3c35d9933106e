"""Prepared corpora: token streams on disk, their tokenizers, and resumable sampling from them.

``python -m data_prep --help`` writes the directories that :class:`Corpus` opens.
"""

from s2moe.data.baselines import compressor_bits
from s2moe.data.corpus import Corpus, CorpusMetadata, SplitMetadata, TokenStream
from s2moe.data.corruption import CORRUPTIONS, corrupt
from s2moe.data.errors import CorpusError
from s2moe.data.sampler import WindowSampler, microbatch_start
from s2moe.data.subwords import SentencePieceTokenizer
from s2moe.data.tokenizer_base import Tokenizer
from s2moe.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    ReducedByteTokenizer,
    load_tokenizer,
)
from s2moe.data.words import WordTokenizer
from s2moe.data.writer import CorpusWriter, write_corpus

__all__ = [
    "CORRUPTIONS",
    "ByteTokenizer",
    "CharacterTokenizer",
    "Corpus",
    "CorpusError",
    "CorpusMetadata",
    "CorpusWriter",
    "ReducedByteTokenizer",
    "SentencePieceTokenizer",
    "SplitMetadata",
    "TokenStream",
    "Tokenizer",
    "WindowSampler",
    "WordTokenizer",
    "compressor_bits",
    "corrupt",
    "load_tokenizer",
    "microbatch_start",
    "write_corpus",
]
