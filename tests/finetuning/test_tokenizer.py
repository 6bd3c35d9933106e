"""The tokenizer that fine-tuning takes from weights, and leaves beside the classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from s2moe.data import ByteTokenizer, SentencePieceTokenizer, WordTokenizer
from s2moe.data.encoding import Keep, encode_text
from s2moe.data.tokenizers import TEXT8_ALPHABET, CharacterTokenizer
from s2moe.finetuning.tokenizer import save_for_auto, tokenizer_of
from s2moe.hub import S2MoETokenizer
from s2moe.hub.directories import export_directory
from s2moe.training.weights import Weights
from tests.models.decoder import tiny


def test_what_was_added_to_a_tokenizer_stays(tmp_path: Path) -> None:
    """Through fine-tuning, and to a model that leaves the project."""
    model = tiny("smoe", vocab_size=256)
    tokenizer = S2MoETokenizer(ByteTokenizer(), model_max_length=64)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.add_tokens(["<sep>"])
    tokenizer.chat_template = "{{ messages[0].content }}<sep>"
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "ours")
    found = tokenizer_of(Weights(hf=tmp_path / "ours"))
    assert found.kind == "byte"
    assert encode_text(found, "a<sep>b", 64).tolist() == [97, 257, 98]
    save_for_auto(found, tmp_path / "tuned", 64)
    export_directory(tmp_path / "ours", tmp_path / "theirs")
    for name in ("tuned", "theirs"):
        after = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (len(after), after.eos_token_id, after.chat_template) == (258, 256, tokenizer.chat_template)
        assert after("a<sep>b")["input_ids"] == [97, 257, 98]
    assert type(after).__module__.startswith("transformers.")


@pytest.mark.parametrize("keep", ["first", "last"])
def test_texts_are_encoded_as_the_corpus_tokenizers_do(keep: Keep, tmp_path: Path) -> None:
    text = "A Fine film of 12,\nand MORE"
    for number, base in enumerate(
        [
            ByteTokenizer(),
            CharacterTokenizer(TEXT8_ALPHABET),
            CharacterTokenizer("Afilm e\n"),
            WordTokenizer.from_texts(["A Fine film\n"]),
            SentencePieceTokenizer.train(["a fine film of 12 and more\n" * 20], 272),
        ]
    ):
        tiny("smoe", vocab_size=base.vocab_size).save_pretrained(tmp_path / str(number))
        base.save(tmp_path / str(number))  # as a directory that has nothing of transformers' own
        found = tokenizer_of(Weights(hf=tmp_path / str(number)))
        for length in (7, 100):
            assert encode_text(found, text, length, keep).equal(encode_text(base, text, length, keep)), base.kind
        save_for_auto(found, tmp_path / str(number), 7, keep)
        again = tokenizer_of(Weights(hf=tmp_path / str(number)))
        assert encode_text(again, text, 7, keep).equal(encode_text(base, text, 7, keep))
