"""The corpora's tokenizers as transformers tokenizers: same ids, added tokens, padding, stop strings, older files."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    StopStringCriteria,
    Trainer,
    TrainingArguments,
)

import s2moe  # noqa: F401  registers the tokenizer
from data_prep.embedded import topics_text
from data_prep.tokenizer_choice import TokenizerChoice
from s2moe.data import (
    ByteTokenizer,
    CorpusError,
    ReducedByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from s2moe.data.encoding import expressible
from s2moe.data.library import library_tokenizer
from s2moe.data.subwords import exact_scores
from s2moe.data.tokenizers import TEXT8_ALPHABET, CharacterTokenizer
from s2moe.hub import S2MoETokenizer, save_tokenizer
from s2moe.hub.tokenization import tokenizer_fingerprint
from tests.models.decoder import tiny

EARLIER = Path(__file__).with_name("earlier_tokenizers")
SENTENCES = "the cat sat on the mat\nthe dog ate the cat's hat\na bat and a rat sat <unk> there\n"
LETTERS = "абв .]^-\\é日🎉\x00\n"
STRANGE = [
    "",
    " two  spaces ",
    "line\nbreak\n",
    "Zürich, 東京, 🎉",
    "<pad> <unk> </s> <s>",
    "the <unk > PAD [CLS]<sep>",
    "<0x41>\u2581<",
    "\x00a\x00\ufffd",
    "  the\x1ccat\x85\u3000dog \r\n\n<eos> a<eos> <eos>",
    "abcdefgh ijkl " * 700,
    "é" * 5000,
]


def given(**options: Any) -> SentencePieceTokenizer:
    """A SentencePiece model as others train them, without their ties."""
    trained = io.BytesIO()
    lines = [line for line in topics_text()[:60_000].decode().splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, minloglevel=2, num_threads=1, **options
    )
    return SentencePieceTokenizer(exact_scores(trained.getvalue()))


MARKS = {"user_defined_symbols": ["<sep>", "[CLS]"], "control_symbols": ["PAD", "the"]}
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "reduced-byte": lambda: ReducedByteTokenizer(bytes(range(32, 127)), "eos"),
    "reduced-byte without lines": lambda: ReducedByteTokenizer(bytes(range(32, 256)), "drop"),
    "character": lambda: CharacterTokenizer(TEXT8_ALPHABET),
    "character of letters": lambda: CharacterTokenizer(LETTERS),
    "sentencepiece": lambda: SentencePieceTokenizer.train([topics_text()[:60_000]], vocab_size=600),
    "sentencepiece without <": lambda: SentencePieceTokenizer.train([SENTENCES.replace("<", "") * 20], vocab_size=275),
    "sentencepiece bpe": lambda: given(model_type="bpe", vocab_size=600, byte_fallback=True),
    "sentencepiece bpe marks": lambda: given(model_type="bpe", vocab_size=600, byte_fallback=True, **MARKS),
    "sentencepiece bpe without bytes": lambda: given(model_type="bpe", vocab_size=400),
    "sentencepiece marks": lambda: given(vocab_size=600, byte_fallback=True, **MARKS),
    "word": lambda: WordTokenizer.from_texts([SENTENCES, "<eos> <unk> é"]),
}
KINDS = pytest.mark.parametrize("kind", MAKERS)
OWN_TEXT = {
    "character": "the cat sat  on it ",
    "character of letters": "аб в.\n🎉",
    "sentencepiece bpe without bytes": "the module is a",
}


@pytest.fixture(scope="module")
def bases() -> dict[str, Tokenizer]:
    return {kind: make() for kind, make in MAKERS.items()}


def texts() -> list[str]:
    """Strange texts, any code points, and few symbols drawn often, where segmentations tie."""
    draw = random.Random(0)
    alphabets = ["ab", "0 ", "=- ", "aeiou n\n", LETTERS, TEXT8_ALPHABET, "".join(map(chr, range(32, 127))), SENTENCES]
    few = ["".join(draw.choices(alphabet, k=draw.choice((5, 60, 400)))) for alphabet in alphabets for _ in range(20)]
    points = [[draw.randrange(0x110000) for _ in range(200)] for _ in range(20)]
    return STRANGE + few + ["".join(chr(p) for p in some if not 0xD800 <= p < 0xE000) for some in points]


@KINDS
def test_the_library_gives_the_ids_of_pre_training(kind: str, bases: dict[str, Tokenizer]) -> None:
    base = bases[kind]
    library = library_tokenizer(base)
    assert library.get_vocab_size() == base.vocab_size
    topics = topics_text().decode()
    compared = 0
    for text in [*texts(), *(topics[at : at + 2000] for at in range(0, len(topics), 20_000))]:
        text = text if kind != "word" or text.endswith("\n") or not text else text + "\n"
        try:
            ids = base.encode(text).tolist()
        except CorpusError:
            continue
        assert library.encode(text).ids == ids, text
        if len(text) < 1000:
            assert library.decode(ids, skip_special_tokens=False) == base.decode(ids)
        compared += 1
    assert compared >= 20


@KINDS
def test_files_are_read_with_and_without_this_project(kind: str, bases: dict[str, Tokenizer], tmp_path: Path) -> None:
    base = bases[kind]
    save_tokenizer(base, tmp_path, max_length=64)
    assert tokenizer_fingerprint(tmp_path) == base.fingerprint()
    text = OWN_TEXT.get(kind, SENTENCES)
    ours, plain = AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert type(ours) is S2MoETokenizer
    for made in (S2MoETokenizer(base), ours, plain, pickle.loads(pickle.dumps(ours))):
        found = made(text, return_offsets_mapping=True)
        ids = found["input_ids"]
        assert ids == base.encode(text).tolist()
        assert made.decode(ids) == made.convert_tokens_to_string(made.tokenize(text)) == base.decode(ids)
        assert made.convert_tokens_to_ids(made.convert_ids_to_tokens(ids)) == ids
        assert made.vocab_size == len(made) == base.vocab_size
        assert (made.padding_side, made.pad_token) == ("left", None)
        offsets = found["offset_mapping"]
        assert all(0 <= start <= stop <= len(text) for start, stop in offsets)
        seen = {at for start, stop in offsets for at in range(start, stop)}
        assert all(at in seen or c.isspace() for at, c in enumerate(text))
    assert ours.model_max_length == plain.model_max_length == 64


def test_a_prompt_of_words_does_not_end() -> None:
    tokenizer = S2MoETokenizer(MAKERS["word"]())
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
    assert tokenizer("the cat\n")["input_ids"][:-1] == tokenizer("the cat")["input_ids"]


def test_scores_of_a_trained_model_add_up_exactly(bases: dict[str, Tokenizer]) -> None:
    """So the same pieces are found in single and double precision, also where orders of them tie."""
    base = bases["sentencepiece"]
    assert isinstance(base, SentencePieceTokenizer)
    scores = [base._processor.get_score(index) * 128 for index in range(base.vocab_size)]
    assert scores == [round(score) for score in scores]
    assert min(scores) / 128 > -22  # 4,096 characters at 10 less stay below 2^24 / 128


def test_bytes_that_are_no_text_become_replacement_characters(bases: dict[str, Tokenizer]) -> None:
    subwords = S2MoETokenizer(bases["sentencepiece"])
    assert subwords.decode(subwords("the 東京")["input_ids"][:-1]) == "the 東\ufffd"
    tokenizer = S2MoETokenizer(ByteTokenizer())
    draw = random.Random(0)
    for _ in range(50):
        some = bytes(draw.choices(b"A\xc3\xa9\xe6\x97\xa5\xf0\x9f\x8e\x89\xff", k=12))
        assert tokenizer.decode(list(some)) == some.decode(errors="replace")


def test_no_id_and_ids_beyond_the_vocabulary() -> None:
    tokenizer = S2MoETokenizer(ByteTokenizer())
    assert tokenizer.decode(tokenizer.eos_token_id) == ""  # there is none
    assert tokenizer.decode([300, 65]) == "A"


def test_what_a_vocabulary_cannot_express_is_left_out(bases: dict[str, Tokenizer]) -> None:
    for kind, text, left in (
        ("character", "The CAT", "he "),
        ("reduced-byte", "é!", "!"),
        ("word", "the x", "the <unk>"),
    ):
        tokenizer = S2MoETokenizer(bases[kind])
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == left


def test_a_model_that_could_not_be_exported_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "words.model"
    path.write_bytes(given(model_type="word", vocab_size=100).model)
    with pytest.raises(CorpusError, match="of whole words cannot be exported; give one of the type unigram or bpe"):
        TokenizerChoice("sentencepiece", None, path).make({})


@KINDS
@pytest.mark.parametrize("token", ["¶", "é", "Ā", "<|user|>", "two words"])
def test_added_tokens_are_new(kind: str, token: str, bases: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = S2MoETokenizer(bases[kind])
    if kind in ("word", "character of letters"):
        token += "+"  # é is a word and a letter, Ā is how NUL is called
    assert tokenizer.add_special_tokens({"eos_token": token}) == 1
    assert tokenizer.eos_token_id == tokenizer.vocab_size == len(tokenizer) - 1
    tokenizer.chat_template = "{{ messages[0].content }}" + token
    tokenizer.save_pretrained(tmp_path)
    text = OWN_TEXT.get(kind, "the cat")
    for made in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        ids = made(text + token)["input_ids"]
        assert ids == [*tokenizer(text)["input_ids"], len(tokenizer) - 1]
        assert made.decode(ids) == text + token
        assert made.decode(ids, skip_special_tokens=True) == text
        assert made.apply_chat_template([{"role": "user", "content": text}])["input_ids"] == ids


def test_stop_strings(bases: dict[str, Tokenizer]) -> None:
    for kind, text, stop in (
        ("byte", "the end", "end"),
        ("byte", "café", "é"),
        ("byte", "你好。", "。"),
        ("reduced-byte", "the end", "end"),
        ("character", "the end", " end"),
        ("character of letters", "аб.", "."),
        ("sentencepiece", "the <end>", "<end>"),
        ("sentencepiece bpe", "the module", "module"),
        ("word", "the cat sat", "cat sat"),
    ):
        tokenizer = S2MoETokenizer(bases[kind])
        stops = StopStringCriteria(tokenizer, [stop])
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert stops(ids, None).item(), (kind, stop)
        assert not stops(ids[:, :-1], None).item(), (kind, stop)


@KINDS
def test_nothing_is_padding_until_it_is_added(kind: str, bases: dict[str, Tokenizer]) -> None:
    tokenizer = S2MoETokenizer(bases[kind])
    text = OWN_TEXT.get(kind, SENTENCES)
    short = text[:2] if kind.startswith("character") else text.split()[0]
    with pytest.raises(ValueError, match="does not have a padding token"):
        tokenizer([text, short], padding=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    batch = tokenizer([text, short], padding=True, return_tensors="pt")
    own = tokenizer(short)["input_ids"]
    assert batch["attention_mask"][1].tolist() == [0] * (batch["input_ids"].shape[1] - len(own)) + [1] * len(own)
    assert batch["input_ids"][1, -len(own) :].tolist() == own
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)[1] == tokenizer.decode(own)
    rows = [tokenizer(text), tokenizer(short)]
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert collated["labels"].ne(-100).equal(collated["attention_mask"].bool())  # each real symbol keeps its label


def test_a_trainer_makes_no_symbol_padding(tmp_path: Path) -> None:
    tokenizer = S2MoETokenizer(CharacterTokenizer(TEXT8_ALPHABET))
    model = tiny("smoe", vocab_size=27)
    rows = [{"input_ids": (ids := tokenizer("a quick brown fox")["input_ids"]), "labels": list(ids)}] * 4
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    tokenizer.pad_token_id, padded = 0, DataCollatorForSeq2Seq(tokenizer)
    collate = padded(rows)
    assert collate["labels"].tolist() == [row["labels"] for row in rows]
    tokenizer = S2MoETokenizer(CharacterTokenizer(TEXT8_ALPHABET))
    Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, data_collator=padded).train()
    assert model.config.pad_token_id is None
    assert model.generation_config.pad_token_id is None


def test_the_symbol_of_padding_has_a_gradient() -> None:
    model = tiny("smoe", vocab_size=27, pad_token_id=0)
    ids = torch.tensor([[0, 3, 0, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[0].norm() > 0


@pytest.mark.parametrize("distilled", ["word", "bigram"])
def test_a_router_by_token_knows_new_tokens(distilled: str, tmp_path: Path) -> None:
    model = tiny("stablemoe", {"distilled": distilled}, vocab_size=256).eval()
    before = model(torch.tensor([[97, 98]])).logits
    model.resize_token_embeddings(258)
    torch.testing.assert_close(model(torch.tensor([[97, 98]])).logits[..., :256], before)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[97, 257, 256]])
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


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
    words = MAKERS["word"]()
    for text in ("the cat", "the\ncat\n", "the \n\n"):
        assert S2MoETokenizer(words, expressible=True)(text)["input_ids"] == words.encode(text).tolist()
    for text in texts():
        assert expressible(base, text) == by_hand(text)


def by_hand(text: str) -> str:
    """text8's filter, in Python."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    spelt = "".join(f" {names[int(c)]} " if c in "0123456789" else c for c in text.lower())
    return " ".join("".join(c if c in TEXT8_ALPHABET else " " for c in spelt).split())


EARLIER_FINGERPRINTS = {
    "byte": "byte:ac8ea97575d032d7",
    "byte-added": "byte:ac8ea97575d032d7",
    "character": "character:146205f2fac6972f",
    "reduced-byte": "reduced-byte:27ecc3398d16df6c",
    "reduced-drop": "reduced-byte:4c2fa0a88f741b53",
    "sentencepiece": "sentencepiece:9e048bb37b0680ca",
    "text8-classifier": "character:146205f2fac6972f",
    "word": "word:89631ff16b76d4df",
}


@pytest.mark.parametrize("name", EARLIER_FINGERPRINTS)
def test_what_earlier_versions_wrote_is_read(name: str, tmp_path: Path) -> None:
    """Files of the last version with tokenizer classes of its own; written anew they are the library's."""
    directory = EARLIER / name
    base = load_tokenizer(directory)
    assert base.fingerprint() == tokenizer_fingerprint(directory) == EARLIER_FINGERPRINTS[name]
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    assert tokenizer_fingerprint(tmp_path) == EARLIER_FINGERPRINTS[name]
    text = "the cat sat  on it " if base.kind == "character" else "the cat sat\n"
    for made in (AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(tmp_path)):
        assert made(text)["input_ids"] == base.encode(expressible(base, text) if "text8" in name else text).tolist()
        assert made.pad_token is None
        if name == "byte-added":
            assert made("ü<end>a<sep>")["input_ids"] == [*"ü".encode(), 256, 97, 257]
            assert (made.eos_token, made.chat_template) == ("<end>", "{{ messages }}")
        if name == "text8-classifier":
            assert made("A film of 2!")["input_ids"] == base.encode("a film of two").tolist()
            assert (made.padding_side, made.truncation_side, made.model_max_length) == ("right", "left", 20)
