"""Saving and loading: identical logits through every door of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from s2moe import S2MoEConfig, S2MoEForCausalLM, S2MoEModel
from tests.models.decoder import tiny

IDS = torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(5))
MODELS: dict[str, dict[str, Any]] = {
    "smoe": {},
    "s2moe": {"method": "s2moe"},
    "tied": {"method": "s2moe_k2", "tie_word_embeddings": True},
    "bias": {"router": {"combine": "sigmoid", "bias_update_rate": 1e-3, "noise": "shazeer"}},
    "mlp": {"moe_expert_form": "mlp", "moe_activation": "relu", "moe_shared_experts": 1, "moe_every": 2},
    "grouped": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
}
PARAMETERS = pytest.mark.parametrize("given", MODELS.values(), ids=MODELS)


def saved(given: dict[str, Any], directory: Path) -> S2MoEForCausalLM:
    """A model whose selection bias, where it has one, decides something."""
    model = tiny(**given).eval()
    for name, buffer in model.named_buffers():
        if "bias_E" in name:
            buffer.normal_()
    model.save_pretrained(directory)
    return model


@PARAMETERS
@pytest.mark.parametrize("door", [S2MoEForCausalLM, AutoModelForCausalLM])
def test_a_loaded_model_is_the_saved_one(given: dict[str, Any], door: Any, tmp_path: Path) -> None:
    model = saved(given, tmp_path)
    torch.manual_seed(77)  # nothing is drawn anew
    loaded, report = door.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is S2MoEForCausalLM
    assert not loaded.training
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for name in state:
        assert torch.equal(state[name], again[name]), name
    assert loaded.config.to_dict()["moe"] == model.config.to_dict()["moe"]
    # Close, not equal: weights mapped from a file start at other addresses, where a product may round otherwise.
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(loaded.double()(IDS).logits, model.double()(IDS).logits, rtol=1e-12, atol=1e-12)


@PARAMETERS
def test_training_goes_on_identically_after_loading(given: dict[str, Any], tmp_path: Path) -> None:
    model = saved(given, tmp_path).train()
    loaded = S2MoEForCausalLM.from_pretrained(tmp_path).train()
    want, got = (made.double()(IDS, labels=IDS).loss for made in (model, loaded))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_base_model_and_configuration_load_through_the_auto_classes(tmp_path: Path) -> None:
    model = saved({}, tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is S2MoEModel
    weights = dict(base.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.model.named_parameters())
    # Equal but for the last bits: how memory is aligned decides which kernel a product takes.
    torch.testing.assert_close(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is S2MoEConfig
    assert type(AutoModelForCausalLM.from_config(config)) is S2MoEForCausalLM


def test_tied_embeddings_are_one_tensor_before_and_after(tmp_path: Path) -> None:
    model = saved({"tie_word_embeddings": True}, tmp_path)
    for made in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert made.lm_head.weight is made.model.embed_tokens.weight
        assert len([p for p in made.parameters() if p.shape == (19, 16)]) == 1
    untied = tiny()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_configuration_file_is_complete_and_reproduces_itself(tmp_path: Path) -> None:
    config = tiny("s2moe", num_key_value_heads=2).config
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "s2moe"
    assert written["moe"]["router"]["combine"] == "softmax_then_topk"  # defaults are spelt out
    assert written["moe"]["stochastic"]["enabled"] is True
    again = S2MoEConfig.from_pretrained(tmp_path)
    assert again.to_dict() == S2MoEConfig(**again.to_dict()).to_dict()
    assert again.moe == config.moe
    assert again.head_dim == config.head_dim


def test_loading_in_half_precision_keeps_bias_and_positions_exact(tmp_path: Path) -> None:
    """Both are buffers that rounding would falsify; weights are rounded, as asked."""
    saved(MODELS["bias"], tmp_path)
    exact = S2MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = S2MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    for (name, buffer), (_, wanted) in zip(loaded.named_buffers(), exact.named_buffers(), strict=True):
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, wanted), name


def test_resizing_the_vocabulary_keeps_what_was_there() -> None:
    model = tiny().eval()
    before = model(IDS).logits
    model.resize_token_embeddings(25, mean_resizing=False)
    after = model(IDS).logits
    assert after.shape[-1] == 25
    assert model.config.vocab_size == 25
    torch.testing.assert_close(after[..., :19], before)
