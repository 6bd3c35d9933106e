"""What every vision model has in common: images in, one output, and a name in the settings.

Legend: B images, C classes, M experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import LayerStatistics
from s2moe.options import LARGEST, option


@strict
class VisionConfig(PreTrainedConfig):
    """The images and classes that a model is made for. In a run they are the data set's."""

    num_channels: int = option(1, "colour channels; set by the data set in a run", least=1, most=LARGEST)
    image_size: int = option(28, "height and width in pixels; set by the data set in a run", least=1, most=LARGEST)
    num_classes: int = option(10, "classes; set by the data set in a run", least=1, most=LARGEST)


@dataclass
class VisionOutput(ModelOutput):
    """``loss`` = ``task_loss`` + ``aux_loss`` is what training minimises; all three are float32 scalars.

    No field may be called as a dictionary's method is (``values``): DeepSpeed goes through an output as a dictionary.
    """

    loss: Tensor | None = None
    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None  # [B, C] logits or log-probabilities: the highest is the prediction; None: no classes
    gate: Tensor | None = None  # float32 [B, M], each image's distribution over experts, where there is one
    selected_prediction: Tensor | None = None  # int64 [B], the class that the expert of the largest gate value predicts
    routing: tuple[LayerStatistics, ...] | None = None  # of SMoE layers, in order
    figures: dict[str, Tensor] | None = None  # detached float32 scalars for the log, by name, the same at every step


class VisionModel(PreTrainedModel):
    """Base of the vision models.

    ``forward(pixel_values [B, channels, H, W] float32, labels [B] int64 | None, context: RoutingContext | None)`` gives
    a ``VisionOutput``. A model with SMoE layers takes ``parallel: ExpertParallel | None`` as its second argument.
    """

    config_class = VisionConfig
    main_input_name = "pixel_values"
    unit_pixels = False  # whether pixels must lie in [0, 1], without the set's normalisation


class VisionKind(NamedTuple):
    """A kind of vision model: ``model.kind=<name>`` in a run's settings."""

    summary: str
    config: type[VisionConfig]
    model: type[VisionModel]


VISION_KINDS: dict[str, VisionKind] = {}


def register_kind(name: str, summary: str, config: type[VisionConfig], model: type[VisionModel]) -> None:
    """Make a model known to run settings by ``name``; ``s2moe.models.vision`` imports every file that calls it."""
    VISION_KINDS[name] = VisionKind(summary, config, model)


def sparse_layers(model: nn.Module) -> dict[int, SMoELayer]:
    """A model's SMoE layers by their number."""
    return {module.layer: module for module in model.modules() if isinstance(module, SMoELayer)}


def mean_auxiliary(routing: tuple[LayerStatistics, ...], like: Tensor) -> Tensor:
    """The auxiliary loss of a model's SMoE layers: their mean, as in the language model; 0 without any."""
    return torch.stack([layer.loss for layer in routing]).mean() if routing else like.new_zeros(())
