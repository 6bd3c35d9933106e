"""S2MoEConfig: derived defaults, and errors that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import s2moe
from s2moe import S2MoEConfig


def test_the_auto_classes_know_the_model() -> None:
    config = AutoConfig.for_model("s2moe", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=5)
    assert type(config) is S2MoEConfig
    assert type(AutoModel.from_config(config)) is s2moe.S2MoEModel
    assert type(AutoModelForCausalLM.from_config(config)) is s2moe.S2MoEForCausalLM


def test_sizes_that_follow_from_others() -> None:
    config = S2MoEConfig(hidden_size=48, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 8)
    assert S2MoEConfig(hidden_size=50, num_attention_heads=6, head_dim=64).head_dim == 64
    assert config.moe["method"] == "s2moe"
    assert config.moe["experts_per_token"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 50, "num_attention_heads": 6}, "hidden_size 50 is not a multiple of num_attention_heads 6"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"moe": {"num_expert": 4}}, "unknown key 'num_expert', did you mean 'num_experts'"),
        ({"moe": {"router": {"zloss": 4}}}, "unknown key 'zloss', did you mean 'z_loss'"),
        ({"moe": {"stochastic": {"sample": 4}}}, "unknown key 'sample', did you mean 'samples'"),
        ({"moe": {"router": {"nam": "topk"}}}, "unknown key 'nam'"),
        ({"moe": {"experts_per_token": 99}}, "experts_per_token"),
        ({"moe": {"method": "smoe", "experts_per_token": 1, "router": {"renormalise": True}}}, "softmax_then_topk"),
    ],
    ids=str,
)
def test_errors_name_the_key_and_the_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        s2moe.S2MoEForCausalLM(S2MoEConfig(**given))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"method": "gshard", "experts_per_token": 3}, "second_choice=random is defined for two experts per token"),
        ({"method": "base", "experts_per_token": 2}, "BASE assigns each token to one expert"),
        ({"method": "compete_smoe", "experts_per_token": 1}, "renormalise with experts_per_token=1"),
        ({"method": "usmoe", "router": {"budget": 99.0}}, r"budget must be positive and at most num_experts \(16\)"),
        ({"method": "similarity_aware", "router": {"rank": 999}}, "rank must not exceed the model's width 256"),
    ],
    ids=str,
)
def test_a_router_that_cannot_be_is_refused_before_it_is_built(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2MoEConfig(moe=moe)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "256"),
        ("vocab_size", 2.5),
        ("hidden_dropout", "none"),
        ("tie_word_embeddings", "no"),
        ("moe", "s2moe"),
    ],
)
def test_wrong_types_are_refused(key: str, value: Any) -> None:
    with pytest.raises(Exception, match=key):
        S2MoEConfig(**{key: value})


def test_given_dictionaries_are_left_alone() -> None:
    moe = {"method": "s2moe", "router": {"z_loss": 1e-3}}
    S2MoEConfig(moe=moe)
    assert moe == {"method": "s2moe", "router": {"z_loss": 1e-3}}
