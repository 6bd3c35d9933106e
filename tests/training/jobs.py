"""Small training runs for tests, as functions that a test can start on any number of ranks."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.data import ByteTokenizer, write_corpus

DISK, GRADIENT = "the disk", "the gradient"
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


def contents(place: Path) -> dict[str, str]:
    """Checksums of all files of a directory, or of the file at that place."""
    files = [path for path in [place, *place.rglob("*")] if path.is_file()]
    return {str(path.relative_to(place.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def train(config_path: str, overrides: list[str], poison: tuple[int, int, str] | None = None) -> dict[str, Any]:
    """Train on this rank; step, validation figure, and the error's text if the run stopped with one.

    `poison` = (rank, step, module) makes the output of a module nan on a rank from a step on. With GRADIENT
    for the module it is its gradient alone; with DISK the step-th file of a checkpoint cannot be written.
    """
    from s2moe.config import ConfigError
    from s2moe.training import loop
    from s2moe.training.errors import TrainingError
    from s2moe.training.processes import start_processes
    from s2moe.training.run import pretrain

    config = load(RunConfig, config_path, overrides)
    processes = start_processes()
    if poison is not None and poison[0] == processes.rank:
        if poison[2] == DISK:
            _fill_disk(poison[1])
        elif poison[2] == GRADIENT:
            _poison_gradient(loop.TrainingLoop, poison[1])
        else:
            _poison(loop.TrainingLoop, *poison[1:])
    try:
        result = pretrain(config, processes)
    except (ConfigError, TrainingError) as error:
        return {"error": str(error)}
    return {
        "step": result.state.step,
        "finished": result.finished,
        "bpc": result.score and result.score.bits_per_symbol,
    }


def train_saying(config_path: str, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """``train``, and what it told the person at the console."""
    from s2moe.training.run_log import RunLog

    say, said = RunLog.say, list[str]()

    def noted(self: RunLog, text: str) -> None:
        said.append(text)
        say(self, text)

    RunLog.say = noted  # type: ignore[method-assign]
    return train(config_path, overrides), said


def _fill_disk(file: int) -> None:
    """The disk is full from this rank's `file`-th checkpoint file on (from 1)."""
    write, files = torch.save, 0

    def save(value: Any, path: str, **options: Any) -> None:
        nonlocal files
        files += 1
        if files >= file:
            raise OSError(28, "No space left on device")
        write(value, path, **options)

    torch.save = save


def _poison_gradient(loop: Any, step: int) -> None:
    """From `step` on, the gradient of the embedding is nan, while the loss is finite."""
    original = loop._forward

    def forward(self: Any, index: int) -> Any:
        output = original(self, index)
        if self.state.step >= step:
            output.loss.register_hook(lambda gradient: gradient * float("nan"))
        return output

    loop._forward = forward


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
