"""The corpus' tokenizers as a transformers tokenizer, which AutoTokenizer finds after ``import s2moe``.

One class serves all kinds: it asks the project's own tokenizer for ids and text, so both give the same ids. Its
files are that tokenizer's, and ``tokenizer_config.json``.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from s2moe.data import Tokenizer, load_tokenizer
from s2moe.data.encoding import expressible as expressible_text
from s2moe.data.subwords import MODEL_FILE, SentencePieceTokenizer
from s2moe.data.tokenizer_base import REPLACEMENT, TOKENIZER_FILE
from s2moe.data.tokenizers import ByteTokenizer, CharacterTokenizer, ReducedByteTokenizer
from s2moe.data.words import UNKNOWN, VOCABULARY_FILE, WordTokenizer


class S2MoETokenizer(PreTrainedTokenizer):
    """Text to the token ids that a model was pre-trained on, and back, exactly.

    Nothing is put before or after a text. These vocabularies have no symbol for padding, and need none, since the
    attention mask says where it is: ``pad_token`` is an ordinary token of the vocabulary (NUL for bytes,
    SentencePiece's <unk>, else id 0), so padded ids are always ids that the model has. Where that token never
    stands for text (<unk>) or hardly ever (NUL), decoding with ``skip_special_tokens=True`` leaves it out; without,
    bytes come back exactly. Padding is on the left by default, as ``generate`` needs it.

    Tokens may be added, as to any tokenizer; the model's embeddings then have to be resized.

    Args:
        base: the project's own tokenizer. ``from_pretrained`` gives its files instead.
        expressible: bring texts into an alphabet of characters first, as fine-tuning does: see ``data/encoding.py``.

    Raises:
        CorpusError: on encoding a text that the vocabulary cannot express.
    """

    vocab_files_names = {
        "tokenizer_state_file": TOKENIZER_FILE,
        "sentencepiece_file": MODEL_FILE,
        "vocabulary_file": VOCABULARY_FILE,
    }
    padding_side = "left"

    def __init__(
        self,
        base: Tokenizer | None = None,
        tokenizer_state_file: str | None = None,
        sentencepiece_file: str | None = None,
        vocabulary_file: str | None = None,
        expressible: bool = False,
        **kwargs: Any,
    ) -> None:
        if base is None:
            if tokenizer_state_file is None:
                raise ValueError(f"the tokenizer needs its file {TOKENIZER_FILE}, or `base`")
            base = load_tokenizer(Path(tokenizer_state_file).parent)
        self.base = base
        self.expressible = expressible
        self._tokens = token_strings(base)
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        padding = self._tokens[padding_id(base)]
        if str(kwargs.get("pad_token")) == padding:
            del kwargs["pad_token"]  # as an added token it would be cut out of texts
        super().__init__(expressible=expressible, **kwargs)  # what is given here is saved
        if self._special_tokens_map["pad_token"] is None:
            self._special_tokens_map["pad_token"] = padding

    @property
    def vocab_size(self) -> int:
        """Ids of the base vocabulary, without tokens added later."""
        return self.base.vocab_size

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that decoding may leave out: not padding's, where that is text."""
        kept = self.base.vocab_size if is_text(self.base) else 0
        return [index for index in super().all_special_ids if index >= kept or index != padding_id(self.base)]

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self._added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.expressible:
            text = expressible_text(self.base, text)
        return [self._tokens[index] for index in self.base.encode(text).tolist()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index] if 0 <= index < len(self._tokens) else REPLACEMENT

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; one that is unknown becomes U+FFFD."""
        vocabulary = self.get_vocab()
        return self._text([vocabulary.get(token, -1) for token in tokens])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens:
            skipped = set(self.all_special_ids)
            ids = [index for index in ids if index not in skipped]
        return self._text(ids)

    def _text(self, ids: list[int]) -> str:
        added = self._added_tokens_decoder
        runs = groupby(ids, lambda index: index in added)
        return "".join(
            "".join(added[index].content for index in run) if is_added else self.base.decode(list(run))
            for is_added, run in runs
        )

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the base tokenizer's files."""
        if filename_prefix:
            raise ValueError("filename_prefix: this tokenizer's files have fixed names")
        return tuple(str(path) for path in self.base.save(save_directory))


def token_strings(base: Tokenizer) -> list[str]:
    """A different string for each id. A byte is the character of its number, as in ByT5."""
    if isinstance(base, ByteTokenizer):
        return [chr(byte) for byte in range(256)]
    if isinstance(base, ReducedByteTokenizer):
        return [chr(byte) for byte in base.alphabet]
    if isinstance(base, CharacterTokenizer):
        return list(base.alphabet)
    if isinstance(base, WordTokenizer):
        return list(base.words)
    assert isinstance(base, SentencePieceTokenizer)
    return base.pieces()


def padding_id(base: Tokenizer) -> int:
    """The id that fills padded places."""
    if isinstance(base, SentencePieceTokenizer):
        return base.unknown_id
    return base.words.index(UNKNOWN) if isinstance(base, WordTokenizer) else 0


def is_text(base: Tokenizer) -> bool:
    """Whether padding's id stands for ordinary text, which decoding must keep."""
    return not isinstance(base, (ByteTokenizer, SentencePieceTokenizer))


def save_tokenizer(base: Tokenizer, directory: Path, max_length: int | None = None, **options: Any) -> None:
    """Write a corpus' tokenizer so that ``load_tokenizer`` and ``AutoTokenizer.from_pretrained`` both read it.

    Args:
        max_length: the model's longest sequence, at which ``truncation=True`` cuts; None: no limit.
        options: further ones of ``S2MoETokenizer``.
    """
    S2MoETokenizer(base, model_max_length=max_length, **options).save_pretrained(directory)
