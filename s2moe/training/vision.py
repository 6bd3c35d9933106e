"""A run that trains a vision model: its images, its model, its evaluation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2moe.config import ConfigError, to_dict
from s2moe.config.vision import VisionRunConfig
from s2moe.data import microbatch_start
from s2moe.data.images import EpochSampler, ImageSet
from s2moe.metrics.specialisation import pes_weights
from s2moe.models.vision import VISION_KINDS, MixtureConfig, VisionConfig, VMoEConfig
from s2moe.moe.freezing import freeze_named
from s2moe.parallel import deepspeed_compat
from s2moe.parallel.batch_norm import synchronise_batch_norms

from .checkpoint import TrainingState
from .engine import start_engine
from .export import HF_DIRECTORY, gather_state, write_model
from .feed import Feed, to_device
from .image_evaluation import ImageScore, evaluate_images
from .job import Job
from .processes import Processes
from .run import Result, train
from .run_directory import VISION
from .run_log import RunLog
from .vision_initial import VisionWeights

EVALUATION_FILE = "evaluation.json"
BEFORE_FILE = "before.json"  # what experts and gate were before the first step, for evaluation.json
OF_BEFORE = ("error", "h_s", "h_u", "mi_pred", "mi_true")  # figures that are kept of it


def train_vision(config: VisionRunConfig, processes: Processes) -> Result:
    """Train the configured vision model, continuing from the newest complete checkpoint if there is one. Collective.

    Raises:
        As `run.train`.
    """
    return train(config, processes, lambda: VisionJob(config, processes))


class ImageFeed(Feed):
    """Training images in the order that `EpochSampler` draws anew every epoch."""

    unit = "images"

    def __init__(self, config: VisionRunConfig, processes: Processes, images: ImageSet) -> None:
        self._sampler = EpochSampler(
            images.train, images.mean, images.std, config.seed, config.data.augmentation_of_training()
        )
        self._processes, self._size = processes, config.micro_batch(processes.world_size)

    def inputs(self, samples: int, index: int) -> dict[str, Any]:
        first = microbatch_start(samples, self._size, self._processes.rank, self._processes.world_size, index)
        pixels, labels_B = self._sampler.batch(first, self._size)
        device = self._processes.device
        return {"pixel_values": to_device(pixels, device), "labels": to_device(labels_B, device)}

    def epoch(self, samples: int) -> int:
        return self._sampler.epoch_of(samples)

    def values(self, inputs: dict[str, Any], output: Any) -> dict[str, Tensor]:
        values: dict[str, Tensor] = dict(output.figures or {})
        if output.logits is not None:
            values["error"] = (output.logits.detach().argmax(-1) != inputs["labels"]).float().mean()
        return values

    def figures(self, state: TrainingState, means: Mapping[str, float]) -> dict[str, float]:
        return {"epoch": state.samples / len(self._sampler)}


@dataclass
class _Last:
    """The score of the finished model, for its file."""

    score: ImageScore | None = None


class VisionJob(Job):
    """Training of a vision model.

    Raises:
        ConfigError, CorpusError: a setting or the data does not allow it.
    """

    kind = VISION
    config: VisionRunConfig
    sample = "images"

    def __init__(self, config: VisionRunConfig, processes: Processes) -> None:
        self._images = images = config.open_images()
        self.config = config = config.for_images(len(images.train))
        self.model_config = config.model_config(images)
        if isinstance(self.model_config, VMoEConfig):
            try:
                self.model_config.check_micro_batch(config.micro_batch(processes.world_size))
            except ValueError as error:
                raise ConfigError(f"model.moe: {error}") from error
        self._processes = processes
        self.feed = ImageFeed(config, processes, images)
        self.state = TrainingState(
            seed=config.seed,
            world_size=processes.world_size,
            expert_parallel=config.training.expert_parallel,
            zero_stage=config.training.zero_stage,
            precision=config.training.precision,
            corpus=f"{images.name}:{images.fingerprint[:16]}:{config.data.augmentation_of_training()}",
            config=to_dict(config) | {"model": config.resolved_model(self.model_config)},
            versions={"torch": str(torch.__version__), "deepspeed": deepspeed.__version__},
        )
        self._last = _Last()

    def initial(self) -> VisionWeights:
        return VisionWeights(self.config, self.model_config)

    def build(self, processes: Processes, initial: VisionWeights | None) -> Any:
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(config, self.model_config).to(processes.device)
        if initial is not None:
            initial.fill(model)
        if config.training.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        synchronise_batch_norms(model, dist.group.WORLD if processes.world_size > 1 else None)
        freeze_named(model, config.training.freeze)
        return start_engine(model, config, processes)

    def begin(self, engine: Any) -> None:
        """Keep what experts and gate are before training: independent experts begin with cosines near 0, say."""
        if not hasattr(engine.module, "expert_weights") or engine.module.config.num_experts == 1:
            return
        engine.eval()
        score, similarity = self._evaluate(engine), weight_similarity(engine.module)
        if self._processes.is_main:
            found = {name: score.figures[name] for name in OF_BEFORE if name in score.figures}
            text = json.dumps(found | {"pes": pes_mean(similarity)})
            (self.config.directory / BEFORE_FILE).write_text(text, encoding="utf-8")

    def prober(self, engine: Any, processes: Processes, log: RunLog) -> Callable[[int], None]:
        return lambda step: None

    def validate(self, engine: Any, full: bool) -> ImageScore:
        engine.eval()
        score = self._evaluate(engine)
        if full:
            score = self._last.score = self._with_sparse(engine, score)
        return score

    def _evaluate(self, engine: Any) -> ImageScore:
        epoch = self.feed.epoch(max(0, self.state.samples - 1))
        batch, seed = self.config.evaluation.batch, self.config.seed
        return evaluate_images(engine, self._images, batch, self._processes, seed, epoch)

    def _with_sparse(self, engine: Any, score: ImageScore) -> ImageScore:
        """For a mixture that could leave experts out: also the error with each image's first expert alone."""
        config = engine.module.config
        if not could_leave_out(config):
            return score
        config.inference = "top1"
        sparse = self._evaluate(engine)
        config.inference = "dense"
        return replace(score, figures=score.figures | {"error_top1": sparse.figures["error"]})

    def validation_values(self, score: ImageScore) -> dict[str, Any]:
        return {f"val/{name}": value for name, value in score.figures.items()}

    def export(self, engine: Any, step: int) -> Path:
        directory = self.config.directory
        state = gather_state(engine.module)
        if state is not None:
            assert self._last.score is not None
            write_evaluation(directory, step, self._last.score, self._images, weight_similarity(engine.module))
            with torch.device("meta"):
                model = build_model(self.config, self.model_config, parallel=False)
            origin = {"run": directory.name, "step": step, "images": self._images.name}
            write_model(model, state, directory / HF_DIRECTORY, origin, run_directory=directory)
        if dist.is_initialized():
            dist.barrier()
        return directory / HF_DIRECTORY


def could_leave_out(config: VisionConfig) -> bool:
    """Whether a model that computes all experts at test could compute the gate's first choice alone."""
    return (
        isinstance(config, MixtureConfig)
        and (config.gate, config.inference, config.form) == ("original", "dense", "mixture")
        and config.num_experts != 1
        and config.preset_split is None
        and not config.batch_statistics
    )


def build_model(config: VisionRunConfig, model_config: VisionConfig, parallel: bool = True) -> Any:
    """The model of the settings; with `parallel`, only the experts that this process owns."""
    model = VISION_KINDS[config.model["kind"]].model
    if parallel and "parallel" in inspect.signature(model.__init__).parameters:
        return model(model_config, deepspeed_compat.expert_parallel(config.training.expert_parallel))
    return model(model_config)


def weight_similarity(model: nn.Module) -> list[list[float]]:
    """Cosine of each pair of experts' weights, [M, M]; empty for a model without experts of its own to compare."""
    weights = getattr(model, "expert_weights", None)
    return pes_weights(weights()).matrix_MM.tolist() if weights is not None else []


def write_evaluation(
    directory: Path, step: int, score: ImageScore, images: ImageSet, similarity: list[list[float]]
) -> None:
    """Write what the finished model came to on the test images as `evaluation.json`.

    Figures called `..._before` are those of the untrained model.

    Args:
        similarity: of the experts' weights.
    """
    figures = dict(score.figures)
    if len(similarity) > 1:
        figures["pes"] = pes_mean(similarity)
    before = directory / BEFORE_FILE
    if before.is_file():
        found = json.loads(before.read_text(encoding="utf-8"))
        figures |= {f"{name}_before": value for name, value in found.items()}
    content = {
        "step": step,
        "images": score.images,
        "set": images.name,
        "classes": list(images.classes),
        "figures": figures,
        "selection": score.selection,
        "similarity": similarity,
    }
    (directory / EVALUATION_FILE).write_text(json.dumps(content), encoding="utf-8")


def pes_mean(matrix: list[list[float]]) -> float:
    """Mean over pairs of different experts."""
    pairs = [value for row, values in enumerate(matrix) for value in values[row + 1 :]]
    return sum(pairs) / len(pairs)


def read_evaluation(directory: Path) -> dict[str, Any]:
    """What `write_evaluation` wrote."""
    found: dict[str, Any] = json.loads((directory / EVALUATION_FILE).read_text(encoding="utf-8"))
    return found
