"""The weights that a new vision run begins with: all of another run's, or parts of a mixture's.

The published protocols go in stages: experts trained alone and then given a gate, a gate kept and given new experts, a
mixture distilled into one that can leave experts out. Each stage is a run that begins with the finished one's weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from s2moe.config.options import ConfigError
from s2moe.config.vision import VisionRunConfig
from s2moe.hub.reading import read_model, require_config
from s2moe.hub.weight_files import WeightFiles
from s2moe.models.vision import VISION_KINDS, MixtureConfig, MixtureModel, VisionConfig, VisionModel
from s2moe.models.vision.mixture_stages import SHAPE, distil, experts_of_gate, gate_of_experts

from .export import HF_DIRECTORY, expert_parameters
from .quiet import no_progress_bars

KEY = "init.weights"
DECIDED = (  # settings of a mixture that a stage has a say in
    "preset_split",
    "gate",
    "frozen",
    "importance_loss",
    "sample_similarity",
    "sample_dissimilarity",
    "gate_kd",
    "inference",
)
OF_THE_GATE = (  # settings of a mixture that a stage which trains its gate, or experts under it, may choose
    "gate",
    "importance_loss",
    "sample_similarity",
    "sample_dissimilarity",
    "similarity_reduction",
    "similarity_distance",
    "similarity_scale",
    "inference",
    "inference_threshold",
)


def find_vision_weights(path: Path) -> Path:
    """The exported model of a finished run, given its directory or its `hf/`.

    Raises:
        ConfigError: there is none.
    """
    for directory in (path, path / HF_DIRECTORY):
        if (directory / "config.json").is_file():
            return directory
    raise ConfigError(f"{path} holds no finished run: expected {HF_DIRECTORY}/ in it. Finish that run first")


def kind_of(directory: Path) -> str:
    """The kind of the vision model in an exported directory.

    Raises:
        ConfigError: it is none of ours.
    """
    found = require_config(directory).get("model_type")
    for name, kind in VISION_KINDS.items():
        if kind.config.model_type == found:
            return name
    raise ConfigError(f"{directory} holds a model of type {found!r}, which is no kind of vision model")


def load_vision_model(path: Path) -> VisionModel:
    """The model of a finished run, on the CPU, in evaluation mode."""
    directory = find_vision_weights(path)
    with no_progress_bars():
        return read_model(VISION_KINDS[kind_of(directory)].model, directory)


class VisionWeights:
    """What a new run begins with.

    Raises:
        ConfigError: there are no such weights, they are another kind's, or the settings are not those of the stage.
    """

    def __init__(self, config: VisionRunConfig, model_config: VisionConfig) -> None:
        assert config.init.weights is not None
        self._stage, kind = config.init.stage, config.model["kind"]
        try:
            self._directory = find_vision_weights(Path(config.init.weights))
            before = kind_of(self._directory)
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from error
        if before != kind:
            raise ConfigError(f"{KEY}: {self._directory} holds a {before}, the run is to train a {kind}")
        self._successor: MixtureModel | None = None
        if self._stage != "all":
            if kind != "mixture":
                raise ConfigError(f"init.stage: {self._stage} is for model.kind=mixture, got {kind}")
            assert isinstance(model_config, MixtureConfig)
            self._successor = next_stage(self._directory, self._stage, model_config, config.seed)
            require_settings(self._successor.config, model_config, self._stage)
        what = "the weights" if self._stage == "all" else self._stage
        self.description = f"begun with {what} of {self._directory}"

    def fill(self, model: nn.Module) -> None:
        """Set weights and buffers of `model`, which holds some of the experts. On every process alike.

        Raises:
            ConfigError: a weight is not there, or has another shape.
        """
        if self._successor is not None:
            model.load_state_dict(self._successor.state_dict())
        else:
            try:
                files = WeightFiles(self._directory)
            except ConfigError as error:
                raise ConfigError(f"{KEY}: {error}") from error
            copy_all(files, model, self._directory)


def next_stage(directory: Path, stage: str, config: MixtureConfig, seed: int) -> MixtureModel:
    """The mixture that a stage makes of a finished run's. Its new parts are not those that the run before began with.

    Raises:
        ConfigError: the finished run's model does not allow the stage.
    """
    trained = load_vision_model(directory)
    assert isinstance(trained, MixtureModel)
    digest = hashlib.blake2b(f"{seed}/{stage}/{directory.parent.name}".encode(), digest_size=4).digest()
    new_seed = int.from_bytes(digest, "little")
    changes = {name: getattr(config, name) for name in OF_THE_GATE}
    try:
        if stage == "distil":
            return distil(trained, new_seed, config.gate_kd, config.inference)
        return {"gate_of_experts": gate_of_experts, "experts_of_gate": experts_of_gate}[stage](
            trained, new_seed, **changes
        )
    except ValueError as error:
        raise ConfigError(f"init.stage: {stage}: {error}") from error


def require_settings(made: MixtureConfig, given: MixtureConfig, stage: str) -> None:
    """Raise ConfigError where the settings are not those of the model that a stage makes."""
    for name in (*SHAPE, *DECIDED):
        before, now = getattr(made, name), getattr(given, name)
        if before != now:
            raise ConfigError(f"model.{name}: init.stage={stage} makes it {before}, got {now}")


def copy_all(files: WeightFiles, model: nn.Module, source: Path) -> None:
    """Every weight and buffer of `model` by its name; of SMoE experts those that the model holds."""
    spread = expert_parameters(model)
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in files.shapes:
                raise ConfigError(f"{KEY}: {source} has no {name}")
            value: Tensor = files.read(name)
            if name in spread:
                value = value[spread[name].local_experts(len(value)).start :][: len(tensor)]
            if value.shape != tensor.shape:
                raise ConfigError(f"{KEY}: {name} has shape {list(value.shape)} there, {list(tensor.shape)} here")
            tensor.copy_(value)
    surplus = sorted(set(files.shapes) - set(state))
    if surplus:
        raise ConfigError(f"{KEY}: {source} has {surplus[0]}, which the model has not")
