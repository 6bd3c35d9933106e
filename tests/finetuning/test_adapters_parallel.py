"""PEFT's adapters under DeepSpeed, on two ranks."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import default_data_collator

from s2moe import S2MoEForCausalLM
from s2moe.config import ConfigError
from s2moe.finetuning.callback import RoutingCallback
from s2moe.finetuning.loading import load_pretrained
from s2moe.finetuning.trainer import S2MoETrainer, cpu_processes, deepspeed_settings
from s2moe.parallel import deepspeed_compat
from tests.distributed_harness import run_distributed
from tests.ties import everywhere, watch

from .test_trainer import Lines
from .trainer_jobs import arguments, logged, pretrained

pytestmark = pytest.mark.distributed
ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapt(source: str, output: str, degree: int, stage: int, resume: bool, **adapter: Any) -> dict[str, Any] | str:
    """Train an adapter on this rank; losses, norms, the evaluation at the end; or the error."""
    settings = {
        "learning_rate": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    args = arguments(output, deepspeed=deepspeed_settings(stage), **settings, **cpu_processes())
    model = load_pretrained(S2MoEForCausalLM, source, deepspeed_compat.expert_parallel(degree))
    torch.manual_seed(2)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**{**ADAPTER, **adapter}))
    biases = [module.bias_E for module in tuned.modules() if hasattr(module, "bias_E")]
    try:
        made = S2MoETrainer(
            model=tuned,
            args=args,
            train_dataset=Lines(),
            eval_dataset=Lines(),
            routing=RoutingCallback(write=False),
        )
    except ConfigError as error:
        return str(error)
    clear = watch(tuned) if (degree, stage) == (1, 1) else []
    made.train(resume_from_checkpoint=resume)
    made.save_model(str(Path(output) / "final"))
    return {
        "losses": logged(made, "loss"),
        "norms": logged(made, "grad_norm"),
        "eval": made.evaluate()["eval_loss"],
        "clear": everywhere(all(clear)),
        "biases": [bias.abs().max().item() for bias in biases],
    }


def run(source: Path, output: Path, degree: int, stage: int, resume: bool = False) -> dict[str, Any]:
    first, second = run_distributed(adapt, 2, str(source), str(output), degree, stage, resume)
    assert first == second
    return first


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_adapter_of_the_attention(tmp_path: Path, stage: int) -> None:
    """Expert parallel 2 equals 1; it resumes; what is saved is the adapter, and gives the same on the whole model."""
    router = {"bias_update_rate": 0.01, "combine": "sigmoid", "balance_loss": 0.1}
    source = pretrained(tmp_path / "source", router=router)
    expected = run(source, tmp_path / "one", 1, 1)
    assert expected["clear"]  # of ties between experts
    found = run(source, tmp_path / "two", 2, stage)
    for name in ("losses", "norms", "eval"):
        assert found[name] == pytest.approx(expected[name], rel=2e-4), name
    assert found["biases"] == [0, 0]  # selection biases are no part of the adapter
    saved = load_file(tmp_path / "two" / "final" / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "one" / "final" / "adapter_model.safetensors")
    assert saved.keys() == wanted.keys()
    assert all("lora_" in name for name in saved)
    assert all(weight.abs().max() > 1e-3 for name, weight in saved.items() if "lora_B" in name)  # they start at zero
    for name, weight in saved.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    assert not (tmp_path / "two" / "final" / "model.safetensors").exists()

    whole = S2MoEForCausalLM.from_pretrained(source).eval()
    tuned = peft.PeftModel.from_pretrained(whole, tmp_path / "two" / "final")
    lines = [Lines()[i] for i in range(len(Lines()))]
    with torch.no_grad():
        losses = [tuned(**default_data_collator(lines[i : i + 4])).task_loss.item() for i in range(0, len(lines), 4)]
    assert statistics.mean(losses) == pytest.approx(found["eval"], rel=1e-4)

    steps = sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*"))
    shutil.rmtree(tmp_path / "two" / steps[-1])
    resumed = run(source, tmp_path / "two", 2, stage, resume=True)
    assert resumed["losses"] == found["losses"]
    assert resumed["eval"] == found["eval"]
    again = load_file(tmp_path / "two" / "final" / "adapter_model.safetensors")
    assert all(again[name].equal(weight) for name, weight in saved.items())


def adapt_experts(source: str, output: str) -> Any:
    return adapt(source, output, 1, 1, False, target_parameters=["experts.w1"])


def test_an_adapter_of_experts_is_refused(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "source")
    for said in run_distributed(adapt_experts, 2, str(source), str(tmp_path / "run")):
        assert "LoRA on experts (base_model.model.model.layers.0.moe.experts.lora_A" in said
        assert "Adapt the attention alone" in said
