"""SNNL-MoE: a mixture on features whose classes the soft nearest neighbour loss has drawn apart.

Agarap & Azcarraga 2026. A convolutional extractor gives features F, which gate and experts alike start from:

    p = softmax(gate(F)),   o = Σ_i p_i expert_i(F),   loss = cross-entropy(o, y) + α · reduce_l SNNL(z_l, y; T)

with z_l the extractor's layers: the outputs, after ReLU, of those that have parameters. What the paper leaves open is
set as its first author's public code has it, or is a setting:

    extractor  his convolutional network up to its last two layers: convolutions of 64 (8 × 8) and 128 channels (6 × 6),
               stride 2, then linear layers of 50 (28 × 28 images), or of 1024 and 1024 (CIFAR); none, the second
               baseline, gives gate and experts the pixels
    experts    the last two layers, F-512-C; the gate is F-512-M
    weights    Kaiming-normal, output layers Xavier-uniform, each expert's drawn by itself
    T          annealed, 1 / (1 + epoch)^0.55; fixed; or learned, T ← T − 0.1 ∂loss/∂T once a training forward pass
    α          positive: classes are drawn apart (Frosst et al. 2019 maximise instead); 0 is the baseline, with the same
               extractor

SNNL is that of the micro-batch of each rank, and wants several images of a class in it: those without another one of
their class count for nothing, so that many classes need large or class-balanced batches.

Legend: B images, M experts, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from s2moe.metrics.selection import sample_entropy, usage_entropy
from s2moe.models.vision.base import VisionConfig, VisionModel, VisionOutput, register_kind
from s2moe.models.vision.mixture import EPSILON, prediction_of_selected
from s2moe.models.vision.stacked import StackedConv, StackedLayer, StackedLinear, kaiming_normal, xavier_uniform
from s2moe.moe.routing import RoutingContext
from s2moe.objectives.snnl import DISTANCES, annealed_temperature, soft_nearest_neighbour_loss
from s2moe.options import check_fields, option
from s2moe.precision import KeepsBuffers, full_precision

LOWEST_TEMPERATURE = 1e-2  # of a learned one, which a step must not take to 0 or below


class ExtractorConv(NamedTuple):
    channels: int
    kernel: int


class Extractor(NamedTuple):
    """Convolutions, all of stride 2 and padding 1, and the widths of linear layers."""

    convs: tuple[ExtractorConv, ...]
    linear: tuple[int, ...]

    def features(self, channels: int, image_size: int) -> int:
        """Features that the convolutions leave of an image; its pixels where there are none.

        Raises:
            ValueError: if nothing is left.
        """
        size = image_size
        for conv in self.convs:
            if size + 2 < conv.kernel:
                raise ValueError(f"image_size {image_size} is too small for the extractor: nothing is left of it")
            size, channels = (size + 2 - conv.kernel) // 2 + 1, conv.channels
        return channels * size**2


_AGARAP = (ExtractorConv(64, 8), ExtractorConv(128, 6))
EXTRACTORS = {
    "mnist": Extractor(_AGARAP, (50,)),
    "cifar": Extractor(_AGARAP, (1024, 1024)),
    "digits": Extractor((ExtractorConv(32, 3), ExtractorConv(64, 3)), (50,)),  # not published: for 8 x 8 pixels
    "none": Extractor((), ()),
}


@strict
class SNNLMoEConfig(VisionConfig):
    """SNNL-MoE (Agarap & Azcarraga 2026). See models/vision/snnl_moe.py.

    Raises:
        ValueError: on impossible values, naming the key.
    """

    model_type = "s2moe_snnl_moe"

    extractor: str = option(
        "mnist", "feature extractor, by the images it is for; none: pixels", choices=tuple(EXTRACTORS)
    )
    num_experts: int = option(5, "experts", least=2, most=10_000)
    hidden: int = option(512, "hidden width of experts and gate", least=1, most=2**20)
    mix: str = option(
        "logits", "what the gate mixes: the experts' logits or their probabilities", choices=("logits", "probabilities")
    )
    snnl_loss: float = option(10.0, "alpha, the coefficient of SNNL; negative entangles classes; 0: the baseline")
    snnl_reduce: str = option(
        "mean",
        "over the extractor's layers; min, as the author's code has it, trains one layer a step",
        choices=("mean", "sum", "min"),
        needs="snnl_loss",
    )
    snnl_distance: str = option("cosine", "distance of two images' features", choices=DISTANCES, needs="snnl_loss")
    snnl_form: str = option(
        "exact",
        "exact: the formula; eps: the public code's, which saturates",
        choices=("exact", "eps"),
        needs="snnl_loss",
    )
    temperature: str = option(
        "annealed",
        "annealed: 1 / (1 + epoch)^0.55; fixed: initial_temperature; learned: from there, by a step of its own",
        choices=("annealed", "fixed", "learned"),
        needs="snnl_loss",
    )
    initial_temperature: float = option(
        50.0,
        "temperature that is fixed, or that learning starts from",
        least=LOWEST_TEMPERATURE,
        needs="temperature!=annealed",
    )
    temperature_rate: float = option(0.1, "step size of a learned temperature", least=0, needs="temperature=learned")

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        EXTRACTORS[self.extractor].features(self.num_channels, self.image_size)  # raises where nothing would be left
        if self.extractor == "none" and self.snnl_loss:
            raise ValueError("snnl_loss: extractor=none has no layers that it could condition: set it to 0")
        super().__post_init__(**kwargs)


class Temperature(KeepsBuffers):
    """T of the soft nearest neighbour loss."""

    value: Tensor

    def __init__(self, kind: str, initial: float, rate: float) -> None:
        super().__init__()
        self.kind, self.initial, self.rate = kind, initial, rate
        self.register_buffer("value", torch.full((1,), initial))  # saved, since a learned one changes

    def reset_parameters(self) -> None:
        if not getattr(self.value, "_is_hf_initialized", False):
            self.value.fill_(self.initial)

    def now(self, epoch: int) -> Tensor:
        """T, [1]; a leaf with a gradient where it is learned."""
        if self.kind == "annealed":
            return torch.full_like(self.value, annealed_temperature(epoch))
        return self.value.clone().requires_grad_(self.kind == "learned" and torch.is_grad_enabled())

    def learn(self, loss: Tensor, temperature: Tensor, group: ProcessGroup | None) -> None:
        """One step down the loss, of which each rank has its own part. It leaves the graph to the backward pass."""
        (slope,) = torch.autograd.grad(loss, temperature, retain_graph=True)
        if group is not None:
            dist.all_reduce(slope, group=group)
            slope = slope / dist.get_world_size(group)
        self.value.sub_(self.rate * slope).clamp_(min=LOWEST_TEMPERATURE)


class FeatureExtractor(nn.Module):
    """Convolutions and linear layers, each followed by ReLU."""

    def __init__(self, extractor: Extractor, channels: int, image_size: int) -> None:
        super().__init__()
        self.convs, self.linear = nn.ModuleList(), nn.ModuleList()
        self.features = extractor.features(channels, image_size)
        for index, conv in enumerate(extractor.convs):
            shape, name = (channels, conv.channels), f"extractor/conv{index}"
            self.convs.append(StackedConv(1, shape, conv.kernel, 1, True, name, stride=2, fill=kaiming_normal))
            channels = conv.channels
        for index, width in enumerate(extractor.linear):
            self.linear.append(StackedLinear(1, (self.features, width), f"extractor/fc{index}", fill=kaiming_normal))
            self.features = width

    def forward(self, image: Tensor) -> list[Tensor]:
        """Every layer's output after ReLU, flattened [B, ..]; the last one is F, without layers the pixels."""
        layers, value = [], image
        for conv in self.convs:
            assert isinstance(conv, StackedConv)
            value = F.relu(conv.one(value, 0))
            layers.append(value.flatten(1))
        value = value.flatten(1)
        for linear in self.linear:
            assert isinstance(linear, StackedLinear)
            value = F.relu(linear.one(value, 0))
            layers.append(value)
        return layers or [value]


class StackedMLPs(nn.Module):
    """M two-layer networks of one input."""

    def __init__(self, count: int, widths: tuple[int, int, int], key: str) -> None:
        super().__init__()
        self.fc = StackedLinear(count, widths[:2], f"{key}/fc", fill=kaiming_normal)
        self.out = StackedLinear(count, widths[1:], f"{key}/out", fill=xavier_uniform)

    def forward(self, feature_BD: Tensor) -> Tensor:
        """[M, B, C]."""
        return self.out(F.relu(self.fc.shared(feature_BD)))


class SNNLMoEModel(VisionModel):
    """Extractor, gate and experts. The output's ``logits`` are the mixed ones, or log of the mixed probabilities."""

    config: SNNLMoEConfig
    config_class = SNNLMoEConfig

    def __init__(self, config: SNNLMoEConfig) -> None:
        super().__init__(config)
        extractor = EXTRACTORS[config.extractor]
        self.extractor = FeatureExtractor(extractor, config.num_channels, config.image_size)
        features = self.extractor.features
        self.gate = StackedMLPs(1, (features, config.hidden, config.num_experts), "gate")
        self.experts = StackedMLPs(config.num_experts, (features, config.hidden, config.num_classes), "experts")
        self.temperature = Temperature(config.temperature, config.initial_temperature, config.temperature_rate)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StackedLayer | Temperature):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, context: RoutingContext | None = None
    ) -> VisionOutput:
        """Loss (with ``labels`` [B]), logits, gate and predictions of images [B, channels, H, W]."""
        layers = self.extractor(pixel_values.to(self.dtype))
        gate_BM = full_precision(self.gate(layers[-1])[0]).softmax(-1)
        expert_MBC = full_precision(self.experts(layers[-1]))
        if self.config.mix == "probabilities":
            logits_BC = (torch.einsum("bm,mbc->bc", gate_BM, expert_MBC.softmax(-1)) + EPSILON).log()
        else:
            logits_BC = torch.einsum("bm,mbc->bc", gate_BM, expert_MBC)
        selected_B = prediction_of_selected(gate_BM, expert_MBC)
        output = VisionOutput(logits=logits_BC, gate=gate_BM, selected_prediction=selected_B)
        if labels is not None:
            if self.config.mix == "probabilities":
                output.task_loss = F.nll_loss(logits_BC, labels)
            else:
                output.task_loss = F.cross_entropy(logits_BC, labels)
            output.aux_loss, figures = self._entanglement(layers, labels, context or RoutingContext())
            output.loss = output.task_loss + output.aux_loss
            gate_BM = gate_BM.detach()
            output.figures = figures | {"h_s": sample_entropy(gate_BM).float(), "h_u": usage_entropy(gate_BM).float()}
        return output

    def expert_logits(self, pixel_values: Tensor) -> Tensor:
        """What every expert says of every image: float32 [M, B, C]."""
        return full_precision(self.experts(self.extractor(pixel_values.to(self.dtype))[-1]))

    def expert_weights(self) -> Tensor:
        """Every expert's weight matrices, flattened, without biases: [M, ..]."""
        layers = (self.experts.fc, self.experts.out)
        return torch.cat([layer.weight.detach().flatten(1) for layer in layers], dim=1)

    def _entanglement(
        self, layers: Sequence[Tensor], label_B: Tensor, context: RoutingContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """α · SNNL, and figures for the log. The baseline computes SNNL only to report it, outside training."""
        config = self.config
        if config.snnl_loss == 0 and self.training:
            return full_precision(layers[-1]).new_zeros(()), {}
        temperature = self.temperature.now(context.epoch)
        losses = [
            soft_nearest_neighbour_loss(value, label_B, temperature, config.snnl_distance, form=config.snnl_form)
            for value in layers
        ]
        stacked = torch.stack(losses)
        if config.snnl_reduce == "min":
            snnl = stacked.min()
        else:
            snnl = stacked.sum() if config.snnl_reduce == "sum" else stacked.mean()
        loss = config.snnl_loss * snnl
        if temperature.requires_grad and self.training:
            self.temperature.learn(loss, temperature, context.group)
        return loss, {"snnl": snnl.detach().float(), "snnl_temperature": temperature.detach()[0].float()}


register_kind("snnl_moe", "features that SNNL conditions, then a mixture (Agarap)", SNNLMoEConfig, SNNLMoEModel)
