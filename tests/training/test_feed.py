"""Bits of a training event: those of the very tokens that its steps saw."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.data import ByteTokenizer, SentencePieceTokenizer, Tokenizer, WindowSampler, write_corpus
from s2moe.training.checkpoint import TrainingState
from s2moe.training.feed import TextFeed

from .jobs import tiny_run

RARE, COMMON = "q7 z9 x3 日本\n" * 40, "the module defines these functions and classes\n" * 60
NATS = 1.7


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_the_loss_is_divided_by_the_symbols_of_its_own_targets(tmp_path: Path, kind: str) -> None:
    """Not by the mean of the split, of which the first windows here are no sample."""
    text = COMMON + RARE
    tokenizer: Tokenizer = ByteTokenizer() if kind == "byte" else SentencePieceTokenizer.train([COMMON * 3 + RARE], 285)
    corpus = write_corpus(tmp_path / "c", "c", dict.fromkeys(("train", "valid", "test"), text), tokenizer)
    path, overrides = tiny_run(tmp_path)
    config = load(RunConfig, path, overrides)
    processes = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    sampler = WindowSampler(corpus.split("train"), config.training.sequence_length, seed=1)
    feed = TextFeed(config, processes, sampler, tokenizer.symbols_V)  # type: ignore[arg-type]
    seen = [feed.inputs(samples, 0) for samples in (0, 4, 8)]
    values = [feed.values(inputs, None) for inputs in seen]
    means = {"train/task_loss": NATS}
    if kind == "byte":
        assert values == [{}] * 3
    else:
        means["train/symbols_per_token"] = float(np.mean([float(one["symbols_per_token"]) for one in values]))
    targets = np.concatenate([inputs["shift_labels"].numpy().reshape(-1) for inputs in seen])
    characters = tokenizer.count_symbols(targets)
    assert kind == "byte" or characters != pytest.approx(
        len(targets) * len(text) / len(corpus.split("train")), rel=1e-3
    )
    bits = feed.figures(TrainingState(seed=1, world_size=1), means)["train/bpc"]
    assert bits == pytest.approx(NATS * len(targets) / (math.log(2) * characters), rel=1e-6)
