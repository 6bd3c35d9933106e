"""Loops under accelerate on the ranks of a test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
from s2moe.parallel import deepspeed_compat

REFUSED = {
    "zero 0": "ZeRO 0 is not supported",
    "uneven": "even_batches=False",
    "one group": "give the optimizer parameter_groups",
    "other degree": "expert_parallel was 1, is 2",
    "no deepspeed": "expert parallelism needs DeepSpeed",
}


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
