"""Small fine-tuning runs through S2MoETrainer, as functions that a test can start on any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, TrainingArguments

from s2moe import S2MoEConfig, S2MoEForCausalLM, S2MoEForSequenceClassification
from s2moe.config import ConfigError
from s2moe.finetuning.callback import RoutingCallback
from s2moe.finetuning.loading import load_pretrained, save_pretrained
from s2moe.finetuning.optimizer import parameter_groups
from s2moe.finetuning.trainer import S2MoETrainer, cpu_processes, deepspeed_settings
from s2moe.moe.freezing import freeze_named
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import ExpertParallel, deepspeed_compat
from tests.ties import everywhere, watch

VOCABULARY, CLASSES, LONGEST = 32, 3, 12


class Texts(Dataset):
    """Random texts of different lengths, right-padded to `width`; the class is decided by the first token."""

    def __init__(self, count: int = 16, width: int = LONGEST, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(4, LONGEST + 1, (1,), generator=generator))
            ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
            padded = torch.zeros(width, dtype=torch.long)
            padded[:length] = ids
            mask = (torch.arange(width) < length).long()
            self.rows.append({"input_ids": padded, "attention_mask": mask, "labels": int(ids[0]) % CLASSES})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def tiny_config(**moe: Any) -> S2MoEConfig:
    """Two layers, four experts, three classes."""
    options = {"method": "smoe", "num_experts": 4, "expert_hidden": 16, **moe}
    return S2MoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=CLASSES,
        max_position_embeddings=64,
        moe=options,
    )


def pretrained(directory: Path, dropout: float = 0.0, **moe: Any) -> Path:
    """A causal language model's directory to fine-tune from."""
    torch.manual_seed(3)
    config = tiny_config(**moe)
    config.hidden_dropout = dropout
    S2MoEForCausalLM(config).save_pretrained(directory)
    return directory


class Lines(Texts):
    """The same texts for a language model."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, "labels": row["input_ids"].where(row["attention_mask"] == 1, -100)}


def arguments(output: Path | str, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-3,  # Adam's quotient of two gradients near zero would enlarge rounding
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "report_to": [],
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 1,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(
    output: Path | str,
    source: Path | str,
    changes: dict[str, Any] | None = None,
    parallel: ExpertParallel | None = None,
    freeze: str = "none",
    data: Texts | None = None,
    args: TrainingArguments | None = None,
    extras: dict[str, Any] | None = None,
    **settings: Any,
) -> S2MoETrainer:
    """A trainer on Texts, its model loaded from `source`."""
    args = args or arguments(output, **settings)
    torch.manual_seed(5)
    changed = {"num_labels": CLASSES, **(changes or {})}
    model = load_pretrained(AutoModelForSequenceClassification, source, parallel, changed)
    freeze_named(model, freeze)
    data = data or Texts()
    routing = RoutingCallback(write=False)
    return S2MoETrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, routing=routing, **(extras or {})
    )


def logged(made: S2MoETrainer, name: str) -> list[float]:
    """A figure of every log event of training."""
    return [event[name] for event in made.state.log_history if "loss" in event]


def spread_run(
    output: str, source: str, degree: int, stage: int, settings: dict[str, Any], resume: bool | str = False
) -> dict[str, Any]:
    """Fine-tune on this rank; losses and norms of the log, evaluation, and which experts the rank holds.

    At degree 1 and stage 1, what others are compared with, also whether all choices of experts were clear of ties.
    `degree` 0: the model is built without ExpertParallel; `stage` 0: torch's DistributedDataParallel, no DeepSpeed.
    """
    if stage:
        args = arguments(output, deepspeed=deepspeed_settings(stage), **settings, **cpu_processes())
    else:
        args = arguments(output, use_cpu=True, **settings)
    parallel = deepspeed_compat.expert_parallel(degree) if degree else None
    made = trainer(output, source, parallel=parallel, args=args)
    clear = watch(made.model) if (degree, stage) == (1, 1) else []
    try:
        made.train(resume_from_checkpoint=resume)
    except ValueError as error:
        return {"error": str(error)}
    evaluated = made.evaluate()
    made.save_model(str(Path(output) / "final"))
    dist.barrier()
    return {
        "losses": logged(made, "loss"),
        "aux": logged(made, "aux_loss"),
        "norms": logged(made, "grad_norm"),
        "eval": evaluated["eval_loss"],
        "clear": everywhere(all(clear)),
        "best": made.state.best_model_checkpoint,
        "experts": len((parallel or ExpertParallel()).local_experts(4)),
        "biases": [router.bias_E.tolist() for router in made.model.modules() if hasattr(router, "bias_E")],
    }


def weights(directory: Path) -> dict[str, Tensor]:
    """The saved weights."""
    return load_file(directory / "model.safetensors")


def accelerate_run(source: str, degree: int, stage: int, output: str) -> list[float]:
    """The same in a loop of one's own, with accelerate; each step's loss over all ranks."""
    cpu_processes()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(stage)))
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    parallel = deepspeed_compat.expert_parallel(degree)
    torch.manual_seed(5)
    model = load_pretrained(S2MoEForSequenceClassification, source, parallel, {"num_labels": CLASSES})
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, weight_decay=0.1), momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    losses = []
    for step in range(4):
        rank = accelerator.process_index
        rows = Texts().rows[(step % 2) * 8 + rank * 4 :][:4]
        batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
        outputs = model(**batch, context=RoutingContext(seed=1, step=step, steps=4, microbatch=rank))
        accelerator.backward(outputs.loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.unwrap_model(model).update_routers([outputs.routing])
        losses.append(accelerator.reduce(outputs.loss.detach(), "mean").item())
    save_pretrained(accelerator.unwrap_model(model), output)
    return losses


REFUSED = {
    "no deepspeed": "expert parallelism needs DeepSpeed",
    "zero 0": "ZeRO 0 is not supported",
    "uneven": "even_batches=False",
    "two optimizers": "take `optimizer` out",
    "use_cpu": "may have no effect",
}


def refusals(source: str, output: str) -> dict[str, str]:
    """The errors of settings that transformers, accelerate and DeepSpeed would accept."""
    config = cpu_processes()["accelerator_config"]
    plain, adam = deepspeed_settings(1), {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    stage = {"stage": 0}
    wrong = {
        "zero 0": ({"deepspeed": {**plain, "zero_optimization": stage}, "accelerator_config": config}, "none"),
        "uneven": ({"deepspeed": plain, "accelerator_config": {**config, "even_batches": False}}, "none"),
        "two optimizers": ({"deepspeed": {**plain, "optimizer": adam}, "accelerator_config": config}, "experts"),
        "use_cpu": ({"deepspeed": plain, "use_cpu": True}, "none"),
        "no deepspeed": ({"use_cpu": True}, "none"),
    }
    found = {}
    parallel = deepspeed_compat.expert_parallel(2)
    for name, (settings, freeze) in wrong.items():
        if name == "no deepspeed":
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        try:
            trainer(output, source, parallel=parallel, freeze=freeze, args=arguments(output, **settings))
        except ConfigError as error:
            found[name] = str(error)
        AcceleratorState._reset_state()
    return found
