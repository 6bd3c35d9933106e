"""The corpora's tokenizers as transformers tokenizers: same ids, exact round trips, batches, saving and loading."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import s2moe  # noqa: F401  registers the tokenizer
from s2moe.data import (
    ByteTokenizer,
    CorpusError,
    ReducedByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from s2moe.data.tokenizers import TEXT8_ALPHABET, CharacterTokenizer
from s2moe.hub import S2MoETokenizer, save_tokenizer
from s2moe.hub.standalone_tokenizer import standalone_tokenizer

SENTENCES = "the cat sat on the mat\nthe dog ate the cat's hat\na bat and a rat sat <unk> there\n"
TEXTS = ["", "plain", " two  spaces ", "line\nbreak\n", "Zürich, 東京, 🎉", "<pad> <unk> </s>", "\x00a\x00", "\ufffd"]


def tokenizers() -> dict[str, Tokenizer]:
    return {
        "byte": ByteTokenizer(),
        "reduced-byte": ReducedByteTokenizer(bytes(range(32, 127)), "eos"),
        "character": CharacterTokenizer(TEXT8_ALPHABET),
        "sentencepiece": SentencePieceTokenizer.train([SENTENCES * 20], vocab_size=275),
        "word": WordTokenizer.from_texts([SENTENCES]),
    }


@pytest.fixture(scope="module")
def bases() -> dict[str, Tokenizer]:
    return tokenizers()


KINDS = pytest.mark.parametrize("kind", ["byte", "reduced-byte", "character", "sentencepiece", "word"])
OWN_TEXT = {"character": "the cat sat  on it ", "reduced-byte": "The cat: 3\n", "word": "the cat sat\nthe dog\n"}


@KINDS
def test_ids_and_text_are_the_project_s_own(kind: str, bases: dict[str, Tokenizer], tmp_path: Path) -> None:
    base = bases[kind]
    save_tokenizer(base, tmp_path, max_length=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is S2MoETokenizer
    assert load_tokenizer(tmp_path).fingerprint() == base.fingerprint()  # the project reads the same directory
    text = OWN_TEXT.get(kind, SENTENCES)
    for made in (S2MoETokenizer(base), loaded):
        ids = made(text)["input_ids"]
        assert ids == base.encode(text).tolist()
        assert made.decode(ids) == base.decode(ids)
        assert made.convert_tokens_to_string(made.tokenize(text)) == base.decode(ids)
        assert made.convert_tokens_to_ids(made.tokenize(text)) == ids
        assert made.convert_tokens_to_ids(made.convert_ids_to_tokens(ids)) == ids
        assert made.vocab_size == len(made) == base.vocab_size
        assert sorted(made.get_vocab().values()) == list(range(base.vocab_size))
    assert loaded.model_max_length == 64


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_exactly(kind: str, text: str, bases: dict[str, Tokenizer], tmp_path: Path) -> None:
    save_tokenizer(bases[kind], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


def test_bytes_that_are_no_text_come_back_as_replacement_characters() -> None:
    tokenizer = S2MoETokenizer(ByteTokenizer())
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"
    assert tokenizer.decode([300, 65]) == "\ufffdA"  # an id that the vocabulary has not


@KINDS
def test_batches_are_padded_on_the_left_with_ids_that_the_model_has(kind: str, bases: dict[str, Tokenizer]) -> None:
    tokenizer = S2MoETokenizer(bases[kind])
    text = OWN_TEXT.get(kind, SENTENCES)
    short = text.split()[0]
    batch = tokenizer([text, short], padding=True, return_tensors="pt")
    assert batch["input_ids"].max() < tokenizer.vocab_size
    own = len(tokenizer(short)["input_ids"])
    assert batch["attention_mask"][1].tolist() == [0] * (batch["input_ids"].shape[1] - own) + [1] * own
    assert batch["input_ids"][1, -own:].tolist() == tokenizer(short)["input_ids"]
    assert tokenizer.pad_token_id < tokenizer.vocab_size
    cut = tokenizer([text, short], padding="max_length", max_length=3, truncation=True)
    assert [len(ids) for ids in cut["input_ids"]] == [3, 3]


def test_decoding_without_special_tokens_drops_padding_but_never_text(bases: dict[str, Tokenizer]) -> None:
    for kind in ("byte", "sentencepiece"):
        tokenizer = S2MoETokenizer(bases[kind])
        padded = tokenizer(["a longer text", "it"], padding=True)["input_ids"]
        assert tokenizer.batch_decode(padded, skip_special_tokens=True) == ["a longer text", "it"]
    spaces = S2MoETokenizer(bases["character"])
    assert spaces.pad_token == " "
    assert spaces.decode(spaces("a b c")["input_ids"], skip_special_tokens=True) == "a b c"


def test_tokens_may_be_added(tmp_path: Path) -> None:
    tokenizer = S2MoETokenizer(ByteTokenizer())
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) == 257
    tokenizer.save_pretrained(tmp_path)
    for made in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = made("ü<end>é")["input_ids"]
        assert ids == [*"ü".encode(), 256, *"é".encode()]
        assert made.decode(ids) == "ü<end>é"
        assert made.decode(ids, skip_special_tokens=True) == "üé"


def test_a_text_beyond_the_vocabulary_is_an_error() -> None:
    with pytest.raises(CorpusError, match="'T' is not among this tokenizer's 27 characters"):
        S2MoETokenizer(CharacterTokenizer(TEXT8_ALPHABET))("The")


def test_texts_may_be_brought_into_the_vocabulary(tmp_path: Path) -> None:
    base = CharacterTokenizer(TEXT8_ALPHABET)
    save_tokenizer(base, tmp_path, 20, expressible=True, truncation_side="left", padding_side="right")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded("A fine film.")["input_ids"]) == "a fine film"
    assert loaded.decode(loaded("A fine film of 12!", truncation=True)["input_ids"]) == "fine film of one two"
    assert loaded.padding_side == "right"
    loaded.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("É, OK")["input_ids"] == base.encode("ok").tolist()
    plain = S2MoETokenizer(ByteTokenizer(), expressible=True)
    assert plain("A fine film.")["input_ids"] == list(b"A fine film.")


@KINDS
def test_worker_processes_can_be_sent_a_tokenizer(kind: str, bases: dict[str, Tokenizer]) -> None:
    tokenizer = S2MoETokenizer(bases[kind])
    text = OWN_TEXT.get(kind, SENTENCES)
    assert pickle.loads(pickle.dumps(tokenizer))(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["byte", "character", "sentencepiece"])
def test_the_form_outside_of_the_project_gives_the_same_ids(
    kind: str, bases: dict[str, Tokenizer], tmp_path: Path
) -> None:
    base = bases[kind]
    standalone_tokenizer(base, 500).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.")
    assert len(loaded) == base.vocab_size
    texts = [OWN_TEXT[kind]] if kind == "character" else [*TEXTS, SENTENCES, "Ā ā", "a\n\nb\n ", " x", "the <unk >"]
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert ids == base.encode(text).tolist()
        assert loaded.decode(ids) == base.decode(ids)


def test_some_tokenizers_have_no_form_outside(bases: dict[str, Tokenizer]) -> None:
    for kind in ("word", "reduced-byte"):
        with pytest.raises(ValueError, match=f"kind {kind!r} has no form outside"):
            standalone_tokenizer(bases[kind])
