"""A corpus' tokenizer in the format of the tokenizers library, for models that leave the project.

transformers' own architectures look for ``tokenizer.json``; with it a converted model needs nothing of this project.
"""

from __future__ import annotations

from sentencepiece import sentencepiece_model_pb2 as model_format
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from s2moe.data import Tokenizer
from s2moe.data.subwords import SentencePieceTokenizer
from s2moe.data.tokenizers import ByteTokenizer, CharacterTokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


def standalone_tokenizer(base: Tokenizer, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """The same ids for the same text. No token stands for padding: it would be cut out of texts that contain it.

    Raises:
        ValueError: the format has no such tokenizer (words, bytes of the older protocols, SentencePiece models that
            are not unigram models with byte fallback).
    """
    if isinstance(base, ByteTokenizer):
        backend = _bytes()
    elif isinstance(base, CharacterTokenizer):
        backend = _characters(base)
    elif isinstance(base, SentencePieceTokenizer):
        backend = _subwords(base)
    else:
        raise ValueError(f"a tokenizer of kind {base.kind!r} has no form outside of this project")
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, padding_side="left")


def _bytes() -> Backend:
    # GPT-2's alphabet: a printable character for each byte, the printable ones themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab={names[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _characters(base: CharacterTokenizer) -> Backend:
    backend = Backend(models.WordLevel({character: index for index, character in enumerate(base.alphabet)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _subwords(base: SentencePieceTokenizer) -> Backend:
    parsed = model_format.ModelProto()
    parsed.ParseFromString(base.model)
    if parsed.trainer_spec.model_type != parsed.trainer_spec.UNIGRAM or not parsed.trainer_spec.byte_fallback:
        raise ValueError("the SentencePiece model is not a unigram model with byte fallback")
    # The library looks for every piece in the text, also for those that SentencePiece makes only itself: <unk> gets
    # a name with a space, which no normalised text has, and bytes such as <0x0A> are dearer than their spelling.
    kinds = model_format.ModelProto.SentencePiece
    dear = min(piece.score for piece in parsed.pieces) - 100
    vocabulary = [(piece.piece, dear if piece.type == kinds.BYTE else piece.score) for piece in parsed.pieces]
    vocabulary[base.unknown_id] = ("<unk >", 0.0)
    backend = Backend(models.Unigram(vocabulary, unk_id=base.unknown_id, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
