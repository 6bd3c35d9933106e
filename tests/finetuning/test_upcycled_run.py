"""Fine-tuning runs from upcycled models, with the tokenizers that they came with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from s2moe.hub.directories import upcycle_directory
from tests.data.classification_files import glue
from tests.distributed_harness import run_distributed
from tests.hub.foreign import foreign

from .finetune_jobs import run
from .test_finetune import CONFIGS, settings

pytestmark = pytest.mark.distributed


def word_tokenizer(directory: Path, texts: Path) -> None:
    """A vocabulary of the texts' words, with a token that is put before each text."""
    words = sorted({word for line in texts.read_text().splitlines() for word in line.split()})
    vocabulary = {word: index for index, word in enumerate(["<s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>").save_pretrained(directory)


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
    assert tokenizer.model_max_length == 32
    assert "Test accuracy" in (tuned / "README.md").read_text()
    assert json.loads((tmp_path / "sst2" / "results.json").read_text())["method"] == "s2moe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.hidden_dropout": 0.1}, "a model of type 's2moe_gpt2' has no hidden_dropout"),
        ({"model.checkpoint": "dense"}, "a model of type 'gpt2', which has no SMoE layers of this project"),
    ],
)
def test_mistakes_are_told(files: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if "model.checkpoint" in changes:
        changes = {"model.checkpoint": files / "dense"}
    found = run_distributed(run, 1, str(CONFIGS / "sst2.yaml"), {**settings(files, tmp_path), **changes})[0]
    assert message in found["error"]
