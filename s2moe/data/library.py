"""The corpora's tokenizers as objects of the tokenizers library, which transformers reads without this project.

The ids are those of the numpy and SentencePiece encoders beside this file, which are many times faster on whole
corpora. What a vocabulary cannot express is left out, as the library never refuses a text.

Names of tokens are what the library's decoders and transformers' stop strings know: a lone byte is ``<0x41>``, and
text that is matched in bytes is written in GPT-2's alphabet, which has a printable character for each byte. No name
is a text that people would add as a token, so that an added ``é`` never takes over a byte's id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_format
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from s2moe.data.errors import CorpusError
from s2moe.data.subwords import SEGMENT, SPACE, SentencePieceTokenizer
from s2moe.data.tokenizer_base import Tokenizer
from s2moe.data.tokenizers import TEXT8_ALPHABET, ByteTokenizer, CharacterTokenizer, ReducedByteTokenizer
from s2moe.data.words import EOS, UNKNOWN, WordTokenizer

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
GPT2 = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
ADDED = "\uffff\ufffe\uffff"  # put before what are not bytes, which the decoder of bytes then leaves alone
WHITE = "".join(c for c in map(chr, range(0x110000)) if c.isspace() and c != "\n")  # what str.split() splits at
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def library_tokenizer(base: Tokenizer) -> Backend:
    """The same ids for any text that ``base`` can express.

    Words alone differ: only a line end is <eos>, so that a prompt does not end with it.

    Raises:
        CorpusError: a SentencePiece model that is made of whole words, which the library does not have.
    """
    if isinstance(base, ByteTokenizer):
        return _bytes(range(256))
    if isinstance(base, ReducedByteTokenizer):
        backend = _bytes(base.alphabet)
        if base.newline == "drop":
            backend.normalizer = normalizers.Replace("\n", "")
        return backend
    if isinstance(base, CharacterTokenizer):
        return _characters(base.alphabet)
    if isinstance(base, WordTokenizer):
        return _words(base)
    assert isinstance(base, SentencePieceTokenizer)
    return _subwords(base)


def expressing(base: Tokenizer) -> normalizers.Normalizer | None:
    """What brings any text into the words and characters of pre-training, as fine-tuning does; None where any text is.

    Of an alphabet other than text8's, the characters that it lacks are left out.
    """
    if isinstance(base, WordTokenizer):
        return ending_a_line()
    if not isinstance(base, CharacterTokenizer):
        return None
    return to_text8() if base.alphabet == TEXT8_ALPHABET else _without(base.alphabet)


def to_text8() -> normalizers.Normalizer:
    """Into text8's 27 characters as its authors did: lower case, digits spelt out, all else a space, never two."""
    spelt = (normalizers.Replace(str(digit), f" {word} ") for digit, word in enumerate(DIGITS))
    others = normalizers.Replace(Regex("[^a-z]+"), " ")
    return normalizers.Sequence([normalizers.Lowercase(), *spelt, others, normalizers.Strip()])


def ending_a_line() -> normalizers.Normalizer:
    """The line end that a text lacks, as each line of pre-training had one."""
    return normalizers.Replace(Regex(r"(?<=[^\n])\z"), "\n")


def _bytes(values: Iterable[int]) -> Backend:
    vocabulary = {f"<0x{byte:02X}>": index for index, byte in enumerate(values)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(_decoding_bytes())
    return backend


def _decoding_bytes(*between: decoders.Decoder) -> list[decoders.Decoder]:
    """From tokens to text; ``between`` change tokens that are more than a byte.

    ByteFallback alone makes replacement characters of a whole run of bytes if it is not UTF-8, ByteLevel of those that
    are not. ASCII always is.
    """
    return [
        decoders.Replace(Regex(r"\A(?!<0x[0-9A-F]{2}>\z)"), ADDED),
        *between,
        *(decoders.Replace(f"<0x{byte:02X}>", GPT2[byte]) for byte in range(128, 256)),
        decoders.ByteFallback(),
        decoders.ByteLevel(),
        decoders.Replace(ADDED, ""),
    ]


def _characters(alphabet: str) -> Backend:
    # The library wants an id for what is unknown, though the normaliser leaves nothing unknown, and writes neighbours
    # of that id as one: so each of these characters is split off.
    unknown = len(alphabet) - 1
    backend = Backend(models.Unigram([(_in_bytes(character), 0.0) for character in alphabet], unk_id=unknown))
    backend.normalizer = _without(alphabet)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(alphabet[unknown], "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    single = [_in_bytes(character) for character in alphabet if ord(character) < 128]
    following = _class(range(0x80, 0xC0))
    more = (f"{_class(lead)}{following}{{{n}}}" for n, lead in enumerate((range(0xC2, 0xE0), range(0xE0, 0xF0)), 1))
    name = "|".join([*map(re.escape, single), *more, f"{_class(range(0xF0, 0xF5))}{following}{{3}}"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(Regex(rf"\A(?!(?:{name})\z)"), ADDED), decoders.ByteLevel(), decoders.Replace(ADDED, "")]
    )
    return backend


def _words(base: WordTokenizer) -> Backend:
    space, line = GPT2[ord(" ")], GPT2[ord("\n")]
    names = (line if word == EOS else _in_bytes(" " + word) for word in base.words)
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Backend(models.WordLevel(vocabulary, unk_token=_in_bytes(" " + UNKNOWN)))
    white = f"[{_escaped(WHITE)}]"
    backend.normalizer = normalizers.Sequence(
        [  # one space before each word, none elsewhere
            normalizers.Replace(Regex(rf"(?<![^\n{white[1:]}){re.escape(EOS)}(?![^\n{white[1:]})"), "\n"),
            normalizers.Prepend(" "),
            normalizers.Replace("\n", "\n "),
            normalizers.Replace(Regex(f"{white}+"), " "),
            normalizers.Replace(Regex(r" (?=\n|\z)"), ""),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(rf"\A(?!{space}|{line}\z)"), ADDED),
            decoders.ByteLevel(),
            decoders.Replace(ADDED, ""),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def _subwords(base: SentencePieceTokenizer) -> Backend:
    parsed = model_format.ModelProto()
    parsed.ParseFromString(base.model)
    kind, kinds = parsed.trainer_spec.model_type, model_format.TrainerSpec
    if kind == kinds.WORD:
        raise CorpusError(
            "a SentencePiece model of whole words cannot be exported; give one of the type unigram or bpe"
        )
    names = _piece_names(parsed)
    model: Any
    if kind == kinds.BPE:
        model = _merging(parsed, names)
    else:
        model = models.Unigram(_scored(parsed, names), unk_id=base.unknown_id, byte_fallback=_has_bytes(parsed))
    backend = Backend(model)
    # SentencePiece never looks for <unk>, <s> or <0x41> in a text, the library would. So SPACE, which is a space to
    # SentencePiece and thus free, stands for the < of texts.
    backend.normalizer = normalizers.Sequence([normalizers.Replace(SPACE, " "), normalizers.Replace("<", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(SEGMENT), "isolated")
    backend.decoder = decoders.Sequence(_decoding_bytes(decoders.Replace(SPACE, "<")))
    if kind == kinds.BPE:
        given = (name for name, piece in zip(names, parsed.pieces, strict=True) if piece.type == piece.USER_DEFINED)
        backend.add_tokens([AddedToken(name, normalized=True) for name in given])
    return backend


def _piece_names(parsed: Any) -> list[str]:
    """How the library calls each piece: as text, or by a name that no text has."""
    merged = parsed.trainer_spec.model_type == model_format.TrainerSpec.BPE
    own_sign = any(piece.piece == "<" and piece.type == piece.NORMAL for piece in parsed.pieces)

    def name(piece: Any) -> str:
        text = str(piece.piece)
        if piece.type == piece.USER_DEFINED and merged:
            return text.replace(SPACE, " ")  # an added token
        if piece.type in (piece.NORMAL, piece.USER_DEFINED):
            return text.replace(SPACE, " ").replace("<", SPACE)
        if text == "<0x3C>" and not own_sign:
            return SPACE
        return text if "<" in text else f"<{text}>"

    return [name(piece) for piece in parsed.pieces]


def _scored(parsed: Any, names: list[str]) -> list[tuple[str, float]]:
    normal = [piece.score for piece in parsed.pieces if piece.type == piece.NORMAL]
    lowest, highest = min(normal), max(normal)  # what is in no piece costs 10 more than the lowest, there as here

    def score(piece: Any) -> float:
        if piece.type == piece.USER_DEFINED:  # so that it is taken, as SentencePiece computes it
            return max(lowest, len(piece.piece.encode()) * highest - 0.1)
        return piece.score if piece.type == piece.NORMAL else lowest

    return [(name, score(piece)) for name, piece in zip(names, parsed.pieces, strict=True)]


def _merging(parsed: Any, names: list[str]) -> models.BPE:
    """Any two neighbours that together are a piece are merged, those of the highest score first."""
    scores = {name: piece.score for name, piece in zip(names, parsed.pieces, strict=True) if piece.type == piece.NORMAL}
    merges = []
    for name in sorted(scores, key=lambda name: -scores[name]):
        cuts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    unknown = names[parsed.trainer_spec.unk_id]
    vocabulary = {name: index for index, name in enumerate(names)}
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_has_bytes(parsed))


def _has_bytes(parsed: Any) -> bool:
    return bool(parsed.trainer_spec.byte_fallback)


def _without(alphabet: str) -> normalizers.Replace:
    return normalizers.Replace(Regex(f"[^{_escaped(alphabet)}]"), "")


def _escaped(characters: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in characters)


def _in_bytes(text: str) -> str:
    return "".join(GPT2[byte] for byte in text.encode())


def _class(values: Iterable[int]) -> str:
    return f"[{_escaped(''.join(GPT2[byte] for byte in values))}]"
