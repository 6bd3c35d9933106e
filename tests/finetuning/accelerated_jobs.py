"""Loops under accelerate on the ranks of a test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin

from s2moe import S2MoEForCausalLM
from s2moe.config import ConfigError
from s2moe.finetuning.accelerated import load_state, prepare
from s2moe.finetuning.loading import load_pretrained
from s2moe.finetuning.optimizer import parameter_groups
from s2moe.finetuning.trainer import cpu_processes, mark_complete, shape_of
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import deepspeed_compat

REFUSED = {
    "zero 0": "ZeRO 0 is not supported",
    "uneven": "even_batches=False",
    "one group": "give the optimizer parameter_groups",
    "other degree": "expert_parallel was 1, is 2",
    "no deepspeed": "expert parallelism needs DeepSpeed",
}


def adapter_run(source: str, experts: bool) -> list[float] | str:
    """Losses of a loop that trains an adapter, of experts too or not, and moves nothing else; or the error."""
    cpu_processes()
    model = load_pretrained(S2MoEForCausalLM, source, deepspeed_compat.expert_parallel(2))
    parts = ["experts.w1"] if experts else None
    torch.manual_seed(1)
    tuned: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parts))
    before = {name: weight.detach().clone() for name, weight in tuned.named_parameters()}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    optimizer = torch.optim.SGD(parameter_groups(tuned, lr=1.0, weight_decay=0.0))
    try:
        engine, optimizer = prepare(accelerator, tuned, optimizer)
    except ConfigError as error:
        return str(error)
    ids = torch.arange(24).reshape(4, 6)[accelerator.process_index * 2 :][:2]
    losses = []
    for step in range(3):
        output = engine(input_ids=ids, labels=ids, context=RoutingContext(seed=1, step=step, steps=3))
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(output.task_loss.detach(), "mean").item())
    moved = {name for name, weight in tuned.named_parameters() if not weight.equal(before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    return losses


def refusals(source: str, states: str) -> dict[str, str]:
    """The errors of loops that accelerate itself would let run, or end with an assertion of DeepSpeed's."""
    cpu_processes()
    model = load_pretrained(S2MoEForCausalLM, source, deepspeed_compat.expert_parallel(2))
    groups: Any = parameter_groups(model, lr=0.1, weight_decay=0.0)
    found = {}
    for name in REFUSED:
        given: dict[str, Any] = {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=0 if name == "zero 0" else 2)}
        if name == "uneven":
            given["dataloader_config"] = DataLoaderConfiguration(even_batches=False)
        if name == "no deepspeed":
            os.environ.pop("ACCELERATE_USE_DEEPSPEED")
            AcceleratorState._reset_state(reset_partial_state=True)
            given = {"cpu": True}
        accelerator = Accelerator(**given)
        try:
            if name == "other degree":
                shape = shape_of(accelerator, model) | {"expert_parallel": 1}
                if accelerator.is_main_process:
                    (Path(states) / "state-4").mkdir()
                    mark_complete(Path(states) / "state-4", shape)
                accelerator.wait_for_everyone()
                load_state(accelerator, model, states)
            else:
                prepare(accelerator, model, torch.optim.SGD(model.parameters() if name == "one group" else groups))
        except ConfigError as error:
            found[name] = str(error)
        AcceleratorState._reset_state()
    return found
