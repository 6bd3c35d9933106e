"""PEFT's adapters around every method: each one trained has an effect, and what is saved is all that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.finetuning.callback import RoutingCallback
from s2moe.finetuning.trainer import S2MoETrainer
from s2moe.moe.methods import METHODS
from s2moe.moe.routing import RoutingContext

from .trainer_jobs import Lines, arguments

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
LEARNING: dict[str, dict[str, Any]] = {  # routers that change between steps, so that a few steps show it
    "loss_free": {"bias_update_rate": 0.1},
    "expert_choice": {},
    "usmoe": {},
    "attention_aware": {"head": "running", "measure_every": 1},
    "stablemoe": {"stage1_fraction": 0.5},
}


def build(method: str, **router: Any) -> S2MoEForCausalLM:
    torch.manual_seed(1)
    return S2MoEForCausalLM(
        S2MoEConfig(**SIZES, moe={"method": method, "num_experts": 4, "expert_hidden": 8, "router": router})
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_every_linear_layer_has_an_effect(method: str) -> None:
    """A layer whose weight is read, instead of the layer being called, would pass its adapter by."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = peft.get_peft_model(build(method), lora).train()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in adapters.values():
        weight.data.normal_(std=0.1)
    model(input_ids=IDS, labels=IDS, context=RoutingContext(seed=1, step=1, steps=9)).loss.backward()
    assert adapters
    assert [name for name, weight in adapters.items() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("adapted", "method"),
    [
        *(("attention", method) for method in LEARNING),
        *(("router", method) for method in ("loss_free", "expert_choice", "usmoe")),  # whose scores are a layer
        *(("router and its state", method) for method in LEARNING),
    ],
)
def test_what_was_trained_is_what_is_saved(method: str, adapted: str, tmp_path: Path) -> None:
    """Also with transformers' own Trainer. A router's state moves only where it is saved with the adapter."""
    base = build(method, **LEARNING[method])
    base.save_pretrained(tmp_path / "base")
    parts: dict[str, Any] = {}
    if adapted == "router":
        parts = {"target_parameters": ["router.scores.weight"]}
    elif adapted == "router and its state":
        parts = {"modules_to_save": ["router"]}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **parts)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kind, callbacks = (Trainer, [RoutingCallback(write=False)]) if adapted == "attention" else (S2MoETrainer, None)
    args = arguments(tmp_path / "out", save_strategy="no", learning_rate=1e-2)
    routing = {} if kind is Trainer else {"routing": RoutingCallback(write=False)}
    kind(model=model, args=args, train_dataset=Lines(), callbacks=callbacks, **routing).train()
    moved = {name for name, buffer in model.named_buffers() if not buffer.equal(before[name])}
    assert bool(moved) is (adapted == "router and its state"), moved

    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
