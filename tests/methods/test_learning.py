"""Every published method learns real text: 150 steps on the documentation that comes with Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.learning import Learner, Text, learn
from s2moe.data import ByteTokenizer, write_corpus
from tests.methods.cases import CASES

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
MOE = {"num_experts": 8, "expert_hidden": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    from pydoc_data.topics import topics

    content = "\n".join(topics[key] for key in sorted(topics)).encode()
    train, valid = content[:-20_000], content[-20_000:]
    directory = tmp_path_factory.mktemp("text") / "topics"
    write_corpus(directory, "topics", {"train": train, "valid": valid, "test": valid}, ByteTokenizer())
    return Text(directory, sequence=64, batch=16, steps=150, lr=4e-3, scored=8_000)


@pytest.mark.slow
@pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
def test_learns_real_text(moe: dict[str, Any], text: Text) -> None:
    """Below 4 bits a byte: their frequencies alone would cost 4.7."""
    settings = {key: value for key, value in moe.items() if key != "method"}
    learner = Learner.of(moe["method"], {"vocab_size": 256, **SIZES}, {**MOE, **settings}, text.seed)
    (outcome,) = learn([learner], text, torch.device("cpu"), lambda line: None)
    assert outcome.bpc < 4.0
