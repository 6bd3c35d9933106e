"""One V-MoE checkpoint at many costs: accuracy against compute, and under corruption.

Riquelme et al. 2021 lower the capacity C, or the experts k of a token, of a trained model at inference. With Batch
Prioritized Routing the tokens of low weight lose their experts first; vanilla routing drops whatever comes last in the
batch. Nothing is retrained.

What capacity drops depends on the batch, so compare rows of the same batches. Figures are of one process.

Legend: B images of a batch, S tokens of an image, K experts of a token.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2moe import drawing
from s2moe.models.vision.base import VisionModel
from s2moe.models.vision.vit import VMoEForImageClassification
from s2moe.models.vision.vit_cost import image_flops
from s2moe.moe.routing import RoutingContext

Batches = Iterable[tuple[Tensor, Tensor]]  # normalised pixel_values float32 [B, channels, H, W], labels int64 [B]

CAPACITIES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0)
PRIORITY_NAMES = {"none": "vanilla", "max": "BPR, highest weight", "sum": "BPR, sum of weights"}


@dataclass(frozen=True)
class Evaluation:
    """Figures over all images. Fractions lie in 0..1; those of routing are means over SMoE layers."""

    images: int
    accuracy: float
    loss: float  # nats an image, of the task
    dropped: float  # assignments beyond capacity
    tokens_without_expert: float
    capacity: float  # of an expert in a routing group, after rounding; of the first batch; nan: dropless


@dataclass(frozen=True)
class CurveRow:
    """One setting of a checkpoint's inference, and what came of it; see Evaluation."""

    capacity_factor: float | None  # C; None: dropless
    experts_per_token: int
    priority: str
    dropped: float
    tokens_without_expert: float
    capacity: float
    flops: float  # of an image, for the assignments that were kept
    buffer_flops: float  # of an image, where all C k S places of the buffers are computed, as on fixed shapes
    accuracy: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(model: VisionModel, batches: Batches, seed: int = 0) -> Evaluation:
    """Accuracy, loss and routing of a classifier in evaluation mode, which it is put back from.

    Args:
        seed: what a model draws is keyed by it and the batch's number.

    Raises:
        ValueError: if there are no images.
    """
    was_training = model.training
    model.eval()
    images, first_capacity = 0, float("nan")
    totals = torch.zeros(4, dtype=torch.float64)  # correct, loss, dropped, tokens without an expert
    for number, (pixels, labels) in enumerate(batches):
        pixels, labels = pixels.to(model.device), labels.to(model.device)
        output = model(pixels, labels, RoutingContext(seed=seed, microbatch=number))
        reports = [layer.values for layer in output.routing or ()]
        if not images and reports and "capacity" in reports[0]:
            first_capacity = reports[0]["capacity"].item()
        routed = [
            sum(values[name].item() for values in reports) / len(reports) if reports and name in reports[0] else 0.0
            for name in ("dropped_fraction", "tokens_without_expert")
        ]
        correct = (output.logits.argmax(-1) == labels).double().mean().item()
        totals += len(labels) * torch.tensor([correct, output.task_loss.item(), *routed], dtype=torch.float64)
        images += len(labels)
    model.train(was_training)
    if not images:
        raise ValueError("there are no images to evaluate on")
    accuracy, loss, dropped, alone = (totals / images).tolist()
    return Evaluation(images, accuracy, loss, dropped, alone, first_capacity)


def vmoe_curve(
    model: VMoEForImageClassification,
    batches: Batches,
    capacities: Sequence[float | None] = CAPACITIES,
    experts_per_token: Sequence[int | None] = (None,),
    priorities: Sequence[str] = ("none", "max"),
    progress: Callable[[CurveRow], None] = lambda row: None,
    seed: int = 0,
) -> list[CurveRow]:
    """A row for each k, priority and C, in this order. The model's own settings of inference are restored.

    Args:
        batches: gone through once for each row: a list, not a generator.
        capacities: C; None: dropless.
        experts_per_token: k; None: as trained.
        progress: called with each row.
        seed: as in ``evaluate``.

    Raises:
        ValueError: if the model's router is not V-MoE's, or it has no SMoE layer.
    """
    if iter(batches) is batches:
        raise ValueError("batches are gone through once for each row: give a list, not an iterator")
    config = model.config
    tokens, moe = config.patches + 1, config.moe_config()
    if moe.router["name"] != "vmoe" or config.placement == "none":
        raise ValueError("the curve over capacities needs SMoE layers with moe.router.name=vmoe")
    before = model.inference
    rows = []
    try:
        for choices in experts_per_token:
            trained = choices or moe.experts_per_token
            for priority in priorities:
                for factor in capacities:
                    model.set_inference(choices, math.inf if factor is None else factor, priority)
                    found = evaluate(model, batches, seed)
                    places = trained * tokens * (1 if factor is None else factor)
                    row = CurveRow(
                        capacity_factor=factor,
                        experts_per_token=trained,
                        priority=priority,
                        dropped=found.dropped,
                        tokens_without_expert=found.tokens_without_expert,
                        capacity=found.capacity,
                        flops=image_flops(config, trained * tokens * (1 - found.dropped)),
                        buffer_flops=image_flops(config, places),
                        accuracy=found.accuracy,
                        loss=found.loss,
                        images=found.images,
                    )
                    rows.append(row)
                    progress(row)
    finally:
        model.set_inference(*before)
    return rows


def robustness(
    model: VisionModel,
    batches_of: Callable[[str, int], Batches],
    kinds: Sequence[str],
    severities: Sequence[int],
    seed: int = 0,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Accuracy under graded corruption: a row {kind, severity, accuracy, loss, dropped, images} for each.

    Args:
        batches_of: the corrupted images of a kind and severity, cut into batches (data/images/corruption.py).
        seed: as in ``evaluate``.
        progress: called with each row.
    """
    rows = []
    for kind in kinds:
        for severity in severities:
            found = evaluate(model, batches_of(kind, severity), seed)
            row = {
                "kind": kind,
                "severity": severity,
                "accuracy": found.accuracy,
                "loss": found.loss,
                "dropped": found.dropped,
                "images": found.images,
            }
            rows.append(row)
            progress(row)
    return rows


def write_curve(rows: Sequence[CurveRow], path: Path) -> None:
    """The rows as CSV, dropless as an empty capacity."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(CurveRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def draw_curve(rows: Sequence[CurveRow], path: Path) -> None:
    """Accuracy against FLOPs, and against C: a line for each k and priority. Dropless rows are horizontal lines."""
    canvas, axes = drawing.subplots(1, 2, figsize=(12, 3.8))
    for choices, priority in dict.fromkeys((row.experts_per_token, row.priority) for row in rows):
        own = [row for row in rows if (row.experts_per_token, row.priority) == (choices, priority)]
        limited = sorted(
            (row for row in own if row.capacity_factor is not None), key=lambda row: row.capacity_factor or 0
        )
        label = f"{PRIORITY_NAMES[priority]}, k = {choices}"
        style = "o--" if priority == "none" else "o-"
        accuracy = [row.accuracy for row in limited]
        (line,) = axes[0].plot([row.flops / 1e6 for row in limited], accuracy, style)
        axes[1].plot([row.capacity_factor for row in limited], accuracy, style, color=line.get_color(), label=label)
        for row in own:
            if row.capacity_factor is None:
                axes[1].axhline(row.accuracy, color=line.get_color(), lw=0.8)
    axes[0].set(xlabel="MFLOPs an image, kept assignments", ylabel="accuracy", title="compute and accuracy")
    axes[1].set(xlabel="capacity C at inference", ylabel="accuracy", title="capacity and accuracy", xscale="log")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    drawing.save(canvas, path)
