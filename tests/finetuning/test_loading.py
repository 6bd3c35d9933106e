"""What `load_pretrained` and the models' own `from_pretrained` take, keep and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import s2moe
from s2moe import S2MoEConfig, S2MoEForCausalLM, S2MoEForSequenceClassification
from s2moe.config import ConfigError
from s2moe.finetuning.loading import load_pretrained
from s2moe.training.weights import load_run_weights
from tests.hub.foreign import foreign, ids

from .trainer_jobs import pretrained


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of an upcycled Llama, which has two end tokens, and of a GPT-2."""
    directory = tmp_path_factory.mktemp("upcycled")
    for name in ("llama", "gpt2"):
        dense = foreign(name)
        dense.generation_config.eos_token_id = [5, 7]
        s2moe.upcycle(dense, experts=4, noise=0.2).save_pretrained(directory / name)
    return {name: directory / name for name in ("llama", "gpt2")}


def test_another_type_of_model_is_refused(upcycled: dict[str, Path], tmp_path: Path) -> None:
    """transformers would draw all weights anew, and evaluation would score them."""
    native = pretrained(tmp_path / "native")
    wrong: list[tuple[Any, Path]] = [
        (S2MoEForCausalLM, upcycled["llama"]),
        (S2MoEForSequenceClassification, upcycled["gpt2"]),
        (S2MoEConfig, upcycled["llama"]),
        (type(AutoConfig.from_pretrained(upcycled["llama"])), native),
        (type(AutoConfig.from_pretrained(upcycled["llama"])), upcycled["gpt2"]),
    ]
    for cls, path in wrong:
        with pytest.raises(ValueError, match="Auto classes find the one that fits"):
            cls.from_pretrained(path)
    with pytest.raises(ConfigError, match="'s2moe_llama' is no 's2moe'"):
        load_run_weights(upcycled["llama"])
    with pytest.raises(ConfigError, match="'s2moe_llama', which no S2MoEForCausalLM has"):
        load_pretrained(S2MoEForCausalLM, upcycled["llama"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "native"])
def test_it_is_what_the_auto_classes_load(name: str, upcycled: dict[str, Path], tmp_path: Path) -> None:
    path = upcycled[name] if name != "native" else pretrained(tmp_path / "native")
    for cls in (AutoModel, AutoModelForCausalLM):
        found, wanted = load_pretrained(cls, path).eval(), cls.from_pretrained(path).eval()
        assert type(found) is type(wanted)
        torch.testing.assert_close(found(ids() % 30)[0], wanted(ids() % 30)[0])
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    if name != "native":
        assert found.generation_config.eos_token_id == [5, 7]


def test_changes(upcycled: dict[str, Path]) -> None:
    changed = {"num_labels": 4, "hidden_dropout": 0.25, "moe": {"router": {"balance_loss": 0.5}}}
    model = load_pretrained(AutoModelForSequenceClassification, upcycled["gpt2"], changes=changed)
    assert model.score.weight.shape == (4, 16)
    assert model.config.resid_pdrop == 0.25
    assert model.transformer.h[0].mlp.dropout.p == 0.25
    assert model.transformer.h[0].mlp.moe.router.options.balance_loss == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 0}, "num_labels must be at least 1"),
        ({"num_labels": "x"}, "with {'num_labels': 'x'}"),
        ({"hidden_dropout": 0.1}, "'s2moe_llama' has no hidden_dropout"),
        ({"moe": {"bogus": 1}}, "bogus"),
    ],
)
def test_impossible_changes(upcycled: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pretrained(AutoModelForSequenceClassification, upcycled["llama"], changes=changes)


def test_the_precision(upcycled: dict[str, Path], tmp_path: Path) -> None:
    """Of what is trained: as `from_pretrained` reads it, in float32 by `load_pretrained`."""
    s2moe.upcycle(foreign("llama").to(torch.bfloat16), experts=4).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_pretrained(AutoModelForCausalLM, tmp_path).dtype == torch.float32
