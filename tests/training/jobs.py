"""Small training runs for tests, as functions that a test can start on any number of ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.data import ByteTokenizer, write_corpus

TINY = """
name: tiny
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  hidden_dropout: 0.1
  moe: {method: s2moe, num_experts: 4, expert_hidden: 32, stochastic: {samples: 16}}
training: {steps: 6, global_batch: 4, micro_batch: 2, sequence_length: 32}
optimizer: {lr: 0.01}
schedule: {warmup_steps: 2}
evaluation: {every: 3, context: 32, segment: 32, max_symbols: 200}
checkpoint: {every: 2, keep: 2}
logging: {every: 1, images_every: 2, sample_tokens: 8}
"""


def tiny_corpus(directory: Path) -> Path:
    """A prepared corpus of a few thousand bytes of made-up words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(40)]
    text = " ".join(generator.choices(words, k=2000)).encode()
    splits = {"train": text[:6000], "valid": text[6000:6600], "test": text[6600:7000]}
    write_corpus(directory, "tiny", splits, ByteTokenizer())
    return directory


def tiny_run(directory: Path) -> tuple[str, list[str]]:
    """A configuration file in `directory`, and the overrides that keep everything else there too."""
    corpus = directory / "data"
    if not corpus.exists():
        tiny_corpus(corpus)
    path = directory / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return str(path), [f"data.dir={corpus}", f"output_dir={directory / 'runs'}"]


def train(config_path: str, overrides: list[str], poison: tuple[int, int, str] | None = None) -> dict[str, Any]:
    """Train on this rank; step, validation figure, and the error's text if the run stopped with one.

    `poison` = (rank, step, module) makes the output of a module nan on a rank from a step on.
    """
    from s2moe.training import loop
    from s2moe.training.errors import TrainingError
    from s2moe.training.processes import start_processes
    from s2moe.training.run import pretrain

    config = load(RunConfig, config_path, overrides)
    processes = start_processes()
    if poison is not None and poison[0] == processes.rank:
        _poison(loop.TrainingLoop, *poison[1:])
    try:
        result = pretrain(config, processes)
    except TrainingError as error:
        return {"error": str(error)}
    return {
        "step": result.state.step,
        "finished": result.finished,
        "bpc": result.score and result.score.bits_per_symbol,
    }


def _poison(loop: Any, step: int, name: str) -> None:
    """From `step` on, make the output of the module called `name` nan."""
    original = loop._forward

    def forward(self: Any, index: int) -> Any:
        if self.state.step < step:
            return original(self, index)
        module = self.engine.module.get_submodule(name)
        healthy = module.forward
        module.forward = lambda *inputs, **named: _nan(healthy(*inputs, **named))
        try:
            return original(self, index)
        finally:
            module.forward = healthy

    loop._forward = forward


def _nan(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output * float("nan")
    return type(output)((output[0] * float("nan"), *output[1:]))
