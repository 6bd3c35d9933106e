"""Tiny whole runs, and everything that can be seen of them but their own configuration."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tests.run_logs import reproducible_events

TEXT = [
    "name=t",
    "training.steps=2",
    "training.global_batch=4",
    "training.micro_batch=2",
    "training.sequence_length=16",
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.moe.num_experts=4",
    "model.moe.expert_hidden=16",
    "model.moe.stochastic.samples=16",
    "optimizer.lr=0.02",
    "evaluation.context=16",
    "evaluation.segment=16",
    "evaluation.every=0",
    "checkpoint.every=0",
    "logging.every=1",
    "logging.tensorboard=false",
    "logging.sample_tokens=0",
    "profile.layers_every=0",
]
VISION = [
    "name=v",
    "data.name=digits",
    "training.steps=2",
    "training.global_batch=16",
    "evaluation.every=2",
    "evaluation.batch=50",
    "data.max_test=50",
    "checkpoint.every=0",
    "logging.every=1",
    "logging.tensorboard=false",
]


def observe_all(kind: str, jobs: dict[str, list[str]]) -> dict[str, str]:
    """What is seen of each run."""
    from tests.training.jobs import tiny_corpus

    with tempfile.TemporaryDirectory() as temporary:
        corpus = tiny_corpus(Path(temporary) / "corpus")
        base = [*TEXT, f"data.dir={corpus}"] if kind == "text" else VISION
        return {
            name: observe(kind, [*base, *given], Path(temporary) / str(number))
            for number, (name, given) in enumerate(jobs.items())
        }


def observe(kind: str, overrides: list[str], output: Path) -> str:
    """What is seen of one run: its optimizer, DeepSpeed's configuration, forward passes, files, weights and log."""
    import deepspeed
    import torch
    from safetensors.torch import load_file

    from s2moe.config import load
    from s2moe.models.attention import S2MoEAttention
    from s2moe.training import run as runs
    from s2moe.training import writing
    from s2moe.training.processes import Processes

    seen: list[Any] = []
    passes = {"train": 0, "background": 0, "compiled": 0}
    rows = set()
    start, attend, background = deepspeed.initialize, S2MoEAttention.forward, writing.BackgroundWriter.__init__

    def initialize(**given: Any) -> Any:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in given["optimizer"].param_groups]
        recomputed = given["model"].is_gradient_checkpointing
        seen.append((type(given["optimizer"]).__name__, groups, given["config"], recomputed))
        return start(**given)

    def forward(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        passes["train"] += self.training
        rows.add((self.training, len(hidden)))
        return attend(self, hidden, *args, **kwargs)

    def writer(self: Any, *args: Any, **kwargs: Any) -> None:
        passes["background"] += 1
        background(self, *args, **kwargs)

    def compiled(self: Any, *args: Any, **kwargs: Any) -> None:  # says so, and spends no time on it
        passes["compiled"] += 1

    quiet = io.StringIO()
    with (
        mock.patch.object(torch.nn.Module, "compile", compiled),
        mock.patch.object(deepspeed, "initialize", initialize),
        mock.patch.object(S2MoEAttention, "forward", forward),
        mock.patch.object(writing.BackgroundWriter, "__init__", writer),
        mock.patch.object(runs, "draw_run"),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        processes = Processes(0, 0, 1, torch.device("cpu"))
        given = [f"output_dir={output}", *overrides]
        if kind == "text":
            from s2moe.config.run import RunConfig

            runs.pretrain(load(RunConfig, None, given), processes)
        else:
            from s2moe.config.vision import VisionRunConfig
            from s2moe.training.vision import train_vision

            train_vision(load(VisionRunConfig, None, given), processes)
    run = next(output.iterdir())
    files = sorted(re.sub(r"events\.out\S+", "events", str(p.relative_to(run))) for p in run.rglob("*") if p.is_file())
    weights = [
        hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
        for file in run.glob("hf/*.safetensors")
        for tensor in load_file(file).values()
    ]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    keys = [sorted(json.loads(line)) for line in lines]
    board = sum(path.stat().st_size for path in run.glob("tensorboard/*")) // 2000
    return repr((seen, passes, sorted(rows), files, weights, keys, board, reproducible_events(run)))
