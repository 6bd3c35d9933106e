"""A run is the textbook's training loop: written out here in plain torch, and compared step by step.

So whatever of the settings does not reach the engine, the optimizer, the model or the data is seen, and so are losses,
gradient norms and learning rates that the log does not have from where it should. Both sides compute the same products,
but DeepSpeed flattens gradients, and clips by another formula, so they agree within rounding, 1e-4 after a few steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from s2moe import S2MoEForCausalLM
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.data import Corpus, WindowSampler
from s2moe.moe.routing import RoutingContext
from s2moe.training import language
from s2moe.training.evaluation import Protocol, Score
from s2moe.training.language import LanguageJob
from tests.distributed_harness import run_distributed

from .jobs import tiny_run

STEPS, BATCH, MICRO, LENGTH = 4, 4, 2, 16
SETTINGS: dict[str, Any] = {  # no value is a default
    "seed": 3,
    "training.steps": STEPS,
    "training.global_batch": BATCH,
    "training.micro_batch": MICRO,
    "training.sequence_length": LENGTH,
    "model.attention_dropout": 0.2,
    "model.hidden_dropout": 0.1,
    "model.moe.router.balance_loss": 0.5,
    "optimizer.lr": 0.02,
    "optimizer.betas": "[0.7, 0.9]",
    "optimizer.eps": 0.01,
    "optimizer.weight_decay": 0.4,
    "optimizer.clip": 0.3,
    "schedule.warmup_steps": 2,
    "schedule.min_lr_ratio": 0.3,
    "logging.every": 1,
    "evaluation.max_symbols": 50,
}
CASES: dict[str, dict[str, Any]] = {
    "s2moe": {},
    "learning between steps": {"model.moe.method": "loss_free", "model.moe.router.bias_update_rate": 0.1},
    "frozen": {"training.freeze": "experts"},
    "two processes": {
        "model.moe.method": "smoe",
        "model.hidden_dropout": 0.0,
        "model.attention_dropout": 0.0,
        "training.expert_parallel": 2,
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_run_is_the_plain_loop(changes: dict[str, Any], tmp_path: Path) -> None:
    path, common = tiny_run(tmp_path)
    given = [f"{name}={value}" for name, value in {**SETTINGS, **changes}.items()]
    if changes.get("model.moe.method") == "loss_free":
        given.append("model.moe.router.balance_loss=0.0")
    ranks = changes.get("training.expert_parallel", 1)
    run_distributed("tests.training.jobs:train", ranks, path, [*common, *given, "name=plain"])
    directory = tmp_path / "runs" / "plain"
    events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    logged = [event for event in events if "train/loss" in event]
    config = load(RunConfig, path, [*common, *given])
    made, weights = plain_loop(config, MICRO * ranks)  # the load is counted over what all ranks do at once
    assert len(logged) == STEPS
    for event, step in zip(logged, made, strict=True):
        for name, value in step.items():
            assert event[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (event["step"], name)
    assert len({round(step["grad_norm"], 3) for step in made}) == STEPS
    trained = load_file(directory / "hf" / "model.safetensors")
    for name, weight in trained.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_a_validation_s_loss_is_of_a_token_and_its_bits_are_of_a_symbol() -> None:
    score = Score(nats=12.0, tokens=4, symbols=3)
    values = LanguageJob.validation_values(cast(LanguageJob, None), score)
    assert values == {"val/bpc": pytest.approx(12 / math.log(2) / 3), "val/loss": 3.0, "val/symbols": 3}


@pytest.mark.parametrize(("full", "symbols"), [(True, None), (False, 5)])
def test_a_validation_is_scored_as_the_settings_say(
    monkeypatch: pytest.MonkeyPatch, full: bool, symbols: int | None
) -> None:
    """A token attends to the length that was trained, however long the windows are."""
    settings = SimpleNamespace(context=2, segment=3, batch=4, max_symbols=5)
    model, corpus = SimpleNamespace(max_position_embeddings=6), SimpleNamespace(metadata=SimpleNamespace(vocab_size=7))
    parts: Any = [SimpleNamespace(evaluation=settings), model, mock.Mock(), mock.Mock(), corpus, torch.device("cpu")]
    monkeypatch.setattr(language, "evaluate", lambda engine, stream, vocabulary, protocol, device: protocol)
    assert language.validation_score(*parts, full) == Protocol("sliding", 2, 3, 4, symbols, 6)


def plain_loop(config: RunConfig, micro: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Each step's figures, and the weights at the end."""
    corpus = Corpus.open(config.data.dir)
    sampler = WindowSampler(corpus.split("train"), LENGTH, seed=3)
    torch.manual_seed(3)
    model = S2MoEForCausalLM(config.model_config(corpus.metadata.vocab_size)).train()
    frozen = config.training.freeze == "experts"
    trained = {name: p for name, p in model.named_parameters() if not (frozen and ".experts." in name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    matrices = [parameter for parameter in trained.values() if parameter.squeeze().dim() > 1]
    vectors = [parameter for parameter in trained.values() if parameter.squeeze().dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.4}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.7, 0.9),
        eps=0.01,
    )
    steps = []
    for step in range(STEPS):
        # Warm-up over two steps, then half a cosine from 1 to 0.3 at the last step.
        factor = (step + 1) / 2 if step < 2 else 0.3 + 0.7 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 1 - 2))) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor
        optimizer.zero_grad()
        losses, routing = [], []
        for index in range(BATCH // micro):
            tokens = torch.from_numpy(sampler.batch(step * BATCH + index * micro, micro))
            torch.manual_seed(dropout_seed(3, step, index))
            context = RoutingContext(seed=3, step=step, steps=STEPS, microbatch=index)
            output = model(input_ids=tokens[:, :-1], context=context, use_cache=False)
            task = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
            auxiliary = torch.stack([layer.loss for layer in output.routing]).mean()
            ((task + auxiliary) / (BATCH // micro)).backward()
            losses.append((task.item(), auxiliary.item()))
            routing.append(output.routing)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.3).item()
        optimizer.step()
        model.update_routers(routing)
        task_loss, aux_loss = (sum(column) / len(losses) for column in zip(*losses, strict=True))
        steps.append(
            {
                "train/loss": task_loss + aux_loss,
                "train/task_loss": task_loss,
                "train/aux_loss": aux_loss,
                "train/bpc": task_loss / math.log(2),
                "grad_norm": norm,
                "lr": 0.02 * factor,
            }
        )
    return steps, {name: value.detach() for name, value in model.state_dict().items()}


def dropout_seed(seed: int, step: int, microbatch: int) -> int:
    digest = hashlib.blake2b(f"dropout/{seed}/{step}/{microbatch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
