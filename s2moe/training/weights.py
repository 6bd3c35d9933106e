"""Read the weights of a run in one process, wherever they are.

`find_weights` takes what a user has: a run directory, an `hf/` directory or one checkpoint. A run's
`hf/` is preferred unless a newer checkpoint exists.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2moe.config.options import ConfigError
from s2moe.hub.directories import require_language_model
from s2moe.hub.reading import read_model, require_whole
from s2moe.hub.tokenization import tokenizer_fingerprint
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.parallel.deepspeed_compat import REST, CheckpointFileError, load_file, to_universal, universal_weights

from .checkpoint import MANIFEST, Checkpoint, find_latest, open_checkpoint
from .engine import DTYPES
from .export import HF_DIRECTORY
from .quiet import no_progress_bars
from .run_directory import exported_step

_EXPERT_KEY = re.compile(r"(.*\.experts\.w[123])\.(\d+)")


@dataclass(frozen=True)
class Weights:
    """Where weights were found: a Hugging Face directory or a complete checkpoint."""

    hf: Path | None = None
    checkpoint: Checkpoint | None = None

    @property
    def description(self) -> str:
        """For the user: which weights these are."""
        if self.hf is not None:
            return str(self.hf)
        assert self.checkpoint is not None
        return f"{self.checkpoint.path} (step {self.checkpoint.state.step})"

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that they were trained with; empty where it is not known."""
        if self.checkpoint is not None:
            return self.checkpoint.state.tokenizer
        assert self.hf is not None
        return tokenizer_fingerprint(self.hf)


def find_weights(path: Path) -> Weights:
    """Locate the newest weights under `path`.

    Raises:
        ConfigError: if there are none, saying what was looked for.
    """
    if (path / "config.json").is_file():
        return Weights(hf=path)
    if (path / MANIFEST).is_file():
        return Weights(checkpoint=open_checkpoint(path))
    latest = find_latest(path / "checkpoints")
    hf = path / HF_DIRECTORY
    if (hf / "config.json").is_file() and (latest is None or (exported_step(hf) or 0) >= latest.state.step):
        return Weights(hf=hf)
    if latest is None:
        raise ConfigError(
            f"no weights in {path}: expected a run directory (with {HF_DIRECTORY}/ or a complete checkpoint under "
            f"checkpoints/), a Hugging Face directory (config.json) or one checkpoint ({MANIFEST})"
        )
    return Weights(checkpoint=latest)


def load_run_weights(path: Path) -> S2MoEForCausalLM:
    """The model of a run, Hugging Face or checkpoint directory, on the CPU, in evaluation mode."""
    return load_weights(find_weights(path))


def check_language_model(hf: Path) -> None:
    """ConfigError where a Hugging Face directory has a classifier, or another model with no language model's head."""
    try:
        require_language_model(hf)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_weights(weights: Weights) -> S2MoEForCausalLM:
    """The model with these weights, on the CPU, in evaluation mode."""
    if weights.hf is not None:
        check_language_model(weights.hf)
        with no_progress_bars():
            return read_model(S2MoEForCausalLM, weights.hf)
    assert weights.checkpoint is not None
    config = checkpoint_config(weights.checkpoint)
    state = checkpoint_state(weights.checkpoint)
    model = S2MoEForCausalLM(config)
    for parameter in model.parameters():  # buffers stay float32
        parameter.data = parameter.data.to(DTYPES[weights.checkpoint.state.precision])
    expected = model.state_dict()
    others = [name for name, tensor in state.items() if name in expected and tensor.shape != expected[name].shape]
    missing = expected.keys() - state.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    require_whole(f"the checkpoint {weights.checkpoint.path}", missing, state.keys() - expected.keys(), others)
    model.load_state_dict(state, strict=False)
    return model.eval()


def checkpoint_config(checkpoint: Checkpoint) -> S2MoEConfig:
    """The model configuration that a checkpoint was trained with."""
    return S2MoEConfig(**checkpoint.state.config["model"])


def checkpoint_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The whole model's state dict out of a checkpoint's files, in the precision of the run.

    Raises:
        ConfigError: a file is not what a checkpoint's file may be.
    """
    dtype = DTYPES[checkpoint.state.precision]
    try:
        if checkpoint.universal:
            return _universal_state(checkpoint.path, dtype)
        if checkpoint.state.zero_stage == 3:  # every process' file holds slices of all weights
            with tempfile.TemporaryDirectory(prefix=".tmp-universal-", dir=checkpoint.path.parent) as folder:
                to_universal(checkpoint.path, Path(folder))
                return _universal_state(Path(folder), dtype)
        return _file_state(checkpoint.path)
    except CheckpointFileError as error:
        raise ConfigError(str(error)) from error


def _universal_state(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The universal form holds the optimizer's float32 copy of what is trained."""
    return {name: tensor.to(dtype, copy=True) for name, tensor in universal_weights(path)} | load_file(
        path / REST, mmap=False
    )


def _file_state(path: Path) -> dict[str, Tensor]:
    """ZeRO 1 and 2: one file for the model without its experts, and one for each expert of each layer."""
    state = load_file(path / "mp_rank_00_model_states.pt", mmap=False)["module"]
    experts: dict[str, dict[int, Tensor]] = {}
    for file in path.glob("layer_*_expert_*_mp_rank_00_model_states.pt"):
        for key, tensor in load_file(file, mmap=False).items():
            match = _EXPERT_KEY.fullmatch(key)
            if match:
                experts.setdefault(match[1], {})[int(match[2])] = tensor
    for name, tensors in experts.items():
        state[name] = torch.stack([tensors[index] for index in range(len(tensors))])
    return state
