"""Fine-tuning runs from upcycled models, with the tokenizers that they came with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from s2moe.config import ConfigError
from s2moe.data.encoding import Keep, encode_text
from s2moe.finetuning.tokenizer import TheirTokenizer, save_for_auto, tokenizer_of
from s2moe.hub.directories import upcycle_directory
from s2moe.training.weights import Weights
from tests.data.classification_files import glue
from tests.distributed_harness import run_distributed
from tests.hub.foreign import foreign

from .finetune_jobs import run
from .test_finetune import CONFIGS, settings

pytestmark = pytest.mark.distributed


def word_tokenizer(directory: Path, texts: Path, template: str = "<s> $A") -> None:
    """A vocabulary of the texts' words, with tokens that are put around each text; none is for padding."""
    words = sorted({word for line in texts.read_text().splitlines() for word in line.split()})
    vocabulary = {word: index for index, word in enumerate(["<s>", "<unk>", "</s>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("upcycled")
    glue(directory / "glue", (240, 60))
    torch.manual_seed(0)
    foreign("gpt2", vocab_size=400, hidden_size=32, n_inner=None, initializer_range=0.05).save_pretrained(
        directory / "dense"
    )
    word_tokenizer(directory / "dense", directory / "glue" / "train.tsv")
    upcycle_directory(directory / "dense", directory / "hf", method="s2moe", experts=4)
    return directory


def test_a_run(files: Path, tmp_path: Path) -> None:
    """It learns on two ranks with half of the experts each, and leaves a classifier that pipelines can use."""
    chosen = settings(files, tmp_path, training__expert_parallel=2)
    found = run_distributed(run, 2, str(CONFIGS / "sst2.yaml"), chosen)[0]
    assert found["results"]["test_accuracy"] > 0.9
    tuned = tmp_path / "sst2" / "hf"
    model = AutoModelForSequenceClassification.from_pretrained(tuned)
    assert type(model).__name__ == "SparseGPT2ForSequenceClassification"
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.transformer.h[0].mlp.moe.experts.w1.shape[0] == 4
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    assert tokenizer("a fine film")["input_ids"][0] == 0  # <s>, as in training
    texts = ["fine", "a dull plot and an awful cast 12", "superb superb film"]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist() == [1, 1] + [0] * 7  # <s> fine
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    together, single = classify(texts, batch_size=2), [classify(text)[0] for text in texts]
    for found_one, wanted in zip(together, single, strict=True):
        assert found_one["label"] == wanted["label"]
        assert found_one["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert tokenizer.model_max_length == 32
    assert "Test accuracy" in (tuned / "README.md").read_text()
    assert json.loads((tmp_path / "sst2" / "results.json").read_text())["method"] == "s2moe"


@pytest.mark.parametrize(("keep", "remaining"), [("first", "<s> fine film </s>"), ("last", "<s> dull plot </s>")])
def test_long_texts_keep_the_tokens_around_them(files: Path, tmp_path: Path, keep: Keep, remaining: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    word_tokenizer(tmp_path, files / "glue" / "train.tsv", "<s> $A </s>")
    tokenizer = tokenizer_of(Weights(hf=tmp_path))
    assert isinstance(tokenizer, TheirTokenizer)
    text = "fine film dull plot"
    ids = encode_text(tokenizer, text, 4, keep).tolist()
    assert tokenizer.base.decode(ids) == remaining
    assert len(encode_text(tokenizer, text, 100, keep)) == 6
    save_for_auto(tokenizer, tmp_path / "saved", 4, keep)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text, truncation=True)["input_ids"] == ids


def test_a_length_without_room_for_text_is_an_error(files: Path, tmp_path: Path) -> None:
    chosen = settings(files, tmp_path, data__input_length=1)
    found = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), chosen)[0]
    assert "data.input_length" in found["error"]


def test_an_unreadable_tokenizer_is_told(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=f"the tokenizer in {tmp_path / 'hf'} cannot be read"):
        tokenizer_of(Weights(hf=tmp_path / "hf"))


def test_a_dense_model_is_refused(files: Path, tmp_path: Path) -> None:
    chosen = settings(files, tmp_path, model__checkpoint=files / "dense")
    found = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), chosen)[0]
    assert "a model of type 'gpt2', which has no SMoE layers of this project" in found["error"]
