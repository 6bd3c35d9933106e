"""Checkpoints of transformers' own mixtures in and out again: logits equal to transformers' own implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from s2moe import S2MoEForCausalLM, from_transformers, to_transformers, upcycle
from tests.hub.foreign import MODELS, foreign, ids
from tests.models.decoder import tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IN: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("mixtral", {}, "S2MoEForCausalLM"),
    "mixtral, one expert": ("mixtral", {"num_experts_per_tok": 1, "tie_word_embeddings": True}, "S2MoEForCausalLM"),
    "mixtral, wide heads": ("mixtral", {"head_dim": 6, "num_key_value_heads": 4}, "S2MoEForCausalLM"),
    "llama": ("llama", {"head_dim": 6}, "S2MoEForCausalLM"),
    "mistral": ("mistral", {"sliding_window": None}, "S2MoEForCausalLM"),
    "qwen2_moe": ("qwen2_moe", {}, "SparseQwen2MoeForCausalLM"),
    "qwen2_moe, renormalised": ("qwen2_moe", {"norm_topk_prob": True}, "SparseQwen2MoeForCausalLM"),
    "qwen3_moe": ("qwen3_moe", {"attention_bias": True}, "SparseQwen3MoeForCausalLM"),
    "qwen3_moe, one expert": ("qwen3_moe", {"num_experts_per_tok": 1}, "SparseQwen3MoeForCausalLM"),
    "olmoe": ("olmoe", {}, "SparseOlmoeForCausalLM"),
    "olmoe, renormalised": ("olmoe", {"norm_topk_prob": True}, "SparseOlmoeForCausalLM"),
}
OUT: dict[str, tuple[dict[str, Any], str]] = {
    "smoe": ({}, "Qwen2MoeForCausalLM"),
    "renormalised": ({"router": {"renormalise": True}}, "MixtralForCausalLM"),
    "one expert": ({"moe_experts_per_token": 1}, "Qwen2MoeForCausalLM"),
    "straight through": (
        {"moe_experts_per_token": 1, "router": {"combine": "straight_through"}},
        "MixtralForCausalLM",
    ),
    "s2moe": ({"method": "s2moe"}, "Qwen2MoeForCausalLM"),
    "noisy_topk": ({"method": "noisy_topk", "router": {"zero_init": False}}, "MixtralForCausalLM"),
    "shared experts": ({"moe_shared_experts": 2}, "Qwen2MoeForCausalLM"),
    "some layers": ({"moe_every": 2, "router": {"renormalise": True}}, "Qwen2MoeForCausalLM"),
    "dense": ({"moe_first_dense": 3}, "LlamaForCausalLM"),
    "grouped": ({"num_key_value_heads": 2, "head_dim": 6, "moe_activation": "gelu"}, "Qwen2MoeForCausalLM"),
    "tied": (
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        "Qwen2MoeForCausalLM",
    ),
}


def check_saved(model: Any, directory: Path) -> None:
    """A saved model loads through the Auto class as the same."""
    model.save_pretrained(directory)
    loaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    vocabulary = model.config.vocab_size
    torch.testing.assert_close(
        loaded(ids() % vocabulary).logits, model(ids() % vocabulary).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("name", "given", "kind"), IN.values(), ids=IN)
def test_in_and_out_again(name: str, given: dict[str, Any], kind: str, tmp_path: Path) -> None:
    theirs = foreign(name, **given)
    wanted = theirs(ids()).logits
    ours = from_transformers(theirs)
    assert type(ours).__name__ == kind
    torch.testing.assert_close(ours(ids()).logits, wanted, **CLOSE)
    check_saved(ours, tmp_path / "ours")
    back = to_transformers(ours)
    assert type(back).__name__ == {"mistral": "LlamaForCausalLM"}.get(name, type(theirs).__name__)
    assert back.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    torch.testing.assert_close(back(ids()).logits, wanted, rtol=1e-6, atol=1e-6)
    check_saved(back, tmp_path / "back")


@pytest.mark.parametrize(("given", "kind"), OUT.values(), ids=OUT)
def test_our_own_models_go_out(given: dict[str, Any], kind: str, tmp_path: Path) -> None:
    ours = tiny(**given).eval()
    out = to_transformers(ours)
    assert type(out).__name__ == kind
    assert type(out).__module__.startswith("transformers.")
    torch.testing.assert_close(out(ids() % 19).logits, ours(ids() % 19).logits, **CLOSE)
    check_saved(out, tmp_path)
    if kind != "Qwen2MoeForCausalLM":  # which comes in as a model with our layers in it
        again = from_transformers(out)
        assert type(again) is S2MoEForCausalLM
        torch.testing.assert_close(again(ids() % 19).logits, ours(ids() % 19).logits, **CLOSE)


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("llama", {}, "MixtralForCausalLM"),
        ("mistral", {}, "MixtralForCausalLM"),
        ("qwen2", {}, "Qwen2MoeForCausalLM"),
        ("qwen2", {"every": 2}, "Qwen2MoeForCausalLM"),
        ("qwen3", {"first_dense": 1, "slices": 2}, "Qwen3MoeForCausalLM"),
    ],
)
def test_upcycled_models_go_out(name: str, given: dict[str, Any], kind: str, tmp_path: Path) -> None:
    ours = upcycle(foreign(name), experts=4, noise=0.3, **given)
    out = to_transformers(ours)
    assert type(out).__name__ == kind
    torch.testing.assert_close(out(ids()).logits, ours(ids()).logits, **CLOSE)
    check_saved(out, tmp_path)


def test_training_goes_on_with_the_checkpoint_s_rule_of_weights() -> None:
    theirs = foreign("qwen3_moe", router_aux_loss_coef=0.02)
    ours = from_transformers(theirs).train()
    moe = ours.config.moe_config()
    assert moe.router["renormalise"] is True
    assert moe.router["balance_loss"] == 0.04  # theirs counts k assignments a token
    output = ours(ids(), labels=ids())
    torch.testing.assert_close(output.task_loss, theirs.train()(ids(), labels=ids()).loss, **CLOSE)
    output.loss.backward()
    theirs(ids(), labels=ids()).loss.backward()
    torch.testing.assert_close(
        ours.model.layers[0].self_attn.q_proj.weight.grad,
        theirs.model.layers[0].self_attn.q_proj.weight.grad,
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "xmoe"}, "router.name=xmoe"),
        ({"method": "loss_free"}, "router.combine=sigmoid; router.bias_update_rate"),
        ({"router": {"renormalise": True, "scale": 2.0}}, "router.scale=2.0"),
        ({"method": "momentum_smoe"}, "momentum.kind=heavy_ball"),
        ({"method": "s2moe", "moe_stochastic": {"inference": "gated"}}, "stochastic.inference=gated"),
        ({"moe_expert_form": "mlp"}, "expert_form=mlp"),
        ({"moe_expert_form": "mlp", "moe_first_dense": 3}, "expert_form=mlp"),
    ],
)
def test_what_transformers_cannot_express_stays_here(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_transformers(tiny(**given))


def test_what_cannot_be_taken_over_is_refused() -> None:
    for name, given, message in (
        ("mistral", {}, "sliding_window=5"),
        ("mixtral", {"sliding_window": 4}, "sliding_window=4"),
        ("llama", {"attention_bias": True}, "attention_bias=true"),
        ("qwen3", {}, "is dense: s2moe.upcycle"),
        ("gpt2", {}, "is dense: s2moe.upcycle"),
        ("mixtral", {"hidden_act": "tanh"}, "'tanh' is not among ours"),
    ):
        with pytest.raises(ValueError, match=message):
            from_transformers(foreign(name, **given))
    for model, message in (
        (upcycle(foreign("gpt2"), experts=4), "no mixture of experts with the blocks of GPT2LMHeadModel|expert_form"),
        (upcycle(foreign("llama"), experts=4, every=2), "has dense layers"),
        (upcycle(foreign("llama", attention_bias=True), experts=4), "attention_bias=true"),
        (foreign("llama"), "none of our SMoE layers"),
    ):
        with pytest.raises(ValueError, match=message):
            to_transformers(model)
    with pytest.raises(ValueError, match="has our SMoE layers already"):
        from_transformers(tiny())


def test_tiny_models_are_of_the_classes_they_are_named_after() -> None:
    for name, (config, model, _) in MODELS.items():
        assert isinstance(foreign(name), getattr(transformers, model))
        assert type(foreign(name).config) is getattr(transformers, config)
