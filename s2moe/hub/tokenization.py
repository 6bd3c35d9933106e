"""The corpora's tokenizers for transformers: its fast tokenizer around objects of the tokenizers library.

`tokenizer.json` is all that there is to one, so ``AutoTokenizer`` reads it without this project, and whatever is added
to it (tokens, special tokens, a chat template) stays through fine-tuning, generation and conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from s2moe.data import CorpusError, Tokenizer, load_tokenizer
from s2moe.data.library import ending_a_line, library_tokenizer, to_text8
from s2moe.data.subwords import MODEL_FILE
from s2moe.data.tokenizer_base import TOKENIZER_FILE
from s2moe.data.tokenizers import TEXT8_ALPHABET, CharacterTokenizer
from s2moe.data.words import VOCABULARY_FILE, WordTokenizer

FINGERPRINT = "corpus_tokenizer"  # of tokenizer_config.json: the fingerprint of the tokenizer of pre-training


class S2MoETokenizer(PreTrainedTokenizerFast):
    """Text to the token ids that a model was pre-trained on, and back.

    Nothing is put before or after a text. What the vocabulary cannot express is left out: characters beyond an
    alphabet; words become <unk>. The vocabularies have no symbol for padding, and none is made up, since one that
    stands for text would lose its labels and its gradient. To pad, add one:
    ``add_special_tokens({"pad_token": "<pad>"})`` and ``model.resize_token_embeddings(len(tokenizer))``. Where the
    attention mask is all that counts, as in ``generate``, ``tokenizer.pad_token_id = 0`` does. Padding goes left.

    Args:
        base: a corpus' tokenizer. ``from_pretrained`` reads files instead, also those that earlier versions wrote.
        expressible: bring texts into the vocabulary first, as fine-tuning does: see ``data/library.py``.

    Raises:
        CorpusError: the library has no tokenizer of this kind.
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        "tokenizer_state_file": TOKENIZER_FILE,  # of earlier versions
        "sentencepiece_file": MODEL_FILE,
        "vocabulary_file": VOCABULARY_FILE,
    }
    padding_side = "left"

    def __init__(self, base: Tokenizer | None = None, expressible: bool = False, **kwargs: Any) -> None:
        if base is not None:
            kwargs |= {"tokenizer_object": library_tokenizer(base), FINGERPRINT: base.fingerprint()}
        kwargs.setdefault("padding_side", self.padding_side)  # only what is named is saved
        super().__init__(expressible=expressible and base is None, **kwargs)
        if expressible:
            make_expressible(self)

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """transformers' own step between files and ``__init__``."""
        state_file = kwargs.pop("tokenizer_state_file", None)
        for name in ("sentencepiece_file", "vocabulary_file"):
            kwargs.pop(name, None)
        if kwargs.get("tokenizer_file") is None:
            if state_file is None:
                raise ValueError("the tokenizer needs its file tokenizer.json")
            # An earlier version's. Its padding was a symbol of the vocabulary.
            kwargs["base"] = load_tokenizer(Path(state_file).parent)
            added = {str(token) for token in (kwargs.get("added_tokens_decoder") or {}).values()}
            if str(kwargs.get("pad_token")) not in added:
                kwargs.pop("pad_token", None)
        return kwargs

    def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        # lm-evaluation-harness decodes the id of an end that there is not.
        return "" if token_ids is None else super()._decode(token_ids, *args, **kwargs)


def make_expressible(tokenizer: PreTrainedTokenizerFast) -> None:
    """Have a tokenizer bring texts into the vocabulary first, where it is one of a corpus; else it stays as it is."""
    settings, backend = tokenizer.init_kwargs, tokenizer.backend_tokenizer
    fingerprint = settings.get(FINGERPRINT)
    if not fingerprint or settings.get("expressible"):
        return
    before = None
    if fingerprint.startswith(f"{WordTokenizer.kind}:"):
        before = ending_a_line()
    elif fingerprint == CharacterTokenizer(TEXT8_ALPHABET).fingerprint():
        before = to_text8()
    if before is not None:
        after = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([before, *after])
    settings["expressible"] = True


def left_out(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The characters of a text that have no token, white space apart."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    seen = {position for start, stop in offsets for position in range(start, stop)}
    return "".join(c for position, c in enumerate(text) if position not in seen and not c.isspace())


def save_tokenizer(base: Tokenizer, directory: Path, max_length: int | None = None, **options: Any) -> None:
    """Write a corpus' tokenizer so that ``AutoTokenizer.from_pretrained`` reads it.

    Args:
        max_length: the model's longest sequence, at which ``truncation=True`` cuts; None: no limit.
        options: further ones of ``S2MoETokenizer``.
    """
    S2MoETokenizer(base, model_max_length=max_length, **options).save_pretrained(directory)


def tokenizer_fingerprint(directory: Path) -> str:
    """Fingerprint of the corpus' tokenizer that a Hugging Face directory has; empty where it has none, or another one.

    Raises:
        CorpusError: it cannot be read.
    """
    if (directory / TOKENIZER_FILE).is_file():
        return load_tokenizer(directory).fingerprint()
    file = directory / "tokenizer_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return str(settings.get(FINGERPRINT, ""))
    except (OSError, ValueError, AttributeError) as error:
        raise CorpusError(f"{file} cannot be read ({type(error).__name__}: {error}); export the model again") from error
