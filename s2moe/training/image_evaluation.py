"""How good a vision model is on the test images, and what its gate selects, over all processes.

Blocks of `batch` images are dealt to the processes in turn, so that the figures do not depend on their number. Every
process makes equally many forward passes, which expert parallelism needs: where there is no block left for it, the
first one is computed once more and not counted.

Legend: B images of a batch, M experts, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from s2moe.data.images import ImageSet, batch_in_order
from s2moe.metrics.latent import ACTIVE_SHARE
from s2moe.metrics.selection import Selection
from s2moe.moe.routing import RoutingContext

from .processes import Processes


@dataclass(frozen=True)
class ImageScore:
    """Figures of the whole test split: `error`, `loss`, the model's own values, and the gate's entropies in bits.

    Attributes:
        selection: rows of counts [M, C], how many test images of each class an expert was selected for; empty
            without a gate over experts.
    """

    images: int
    figures: dict[str, float]
    selection: list[list[int]] = field(default_factory=list)


def active_experts(images_M: torch.Tensor) -> int:
    """Experts that were selected for at least ACTIVE_SHARE of the images, given how many each was selected for."""
    return int((images_M >= (ACTIVE_SHARE * images_M.sum()).clamp(min=1)).sum())


@torch.no_grad()
def evaluate_images(
    model: Any,
    images: ImageSet,
    batch: int,
    processes: Processes,
    seed: int = 0,
    epoch: int = 0,
) -> ImageScore:
    """Score the test split. Collective.

    `loss` is the mean negative log-likelihood of the labels, `task_loss` the model's own; both, and the model's values,
    are means over images. What a model draws (a latent sample, an expert) is keyed by `seed` and the block; a schedule
    by epochs stands at `epoch`.

    Raises:
        ValueError: the model is in training mode, where batch normalisation and dropout would do something else.
    """
    if getattr(model, "module", model).training:  # DeepSpeed's engine itself is always in training mode
        raise ValueError("the model is in training mode: call eval() before evaluating it")
    rank, world, device = processes.rank, processes.world_size, processes.device
    blocks = math.ceil(len(images.test) / batch)
    selection: Selection | None = None
    sums: dict[str, torch.Tensor] = {}
    for turn in range(math.ceil(blocks / world)):
        block = turn * world + rank
        counts = block < blocks
        pixels, labels_B = batch_in_order(images, batch * (block if counts else 0), batch)
        pixels, labels_B = pixels.to(device), labels_B.to(device)
        context = RoutingContext(seed=seed, microbatch=block, epoch=epoch)
        output = model(pixel_values=pixels, labels=labels_B, context=context)
        found = dict(output.figures or {})
        found["task_loss"] = output.task_loss
        if output.logits is not None:
            logits_BC = output.logits.float()
            found["error"] = (logits_BC.argmax(-1) != labels_B).double().mean()
            found["loss"] = F.cross_entropy(logits_BC, labels_B)
        weight = float(len(labels_B) * counts)
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + value.double() * weight
        if output.gate is not None:
            if selection is None:
                selection = Selection.zero(output.gate.shape[1], len(images.classes), device)
            has_predictions = output.selected_prediction is not None
            predicted_B = output.selected_prediction if has_predictions else torch.zeros_like(labels_B)
            selection.add(output.gate, labels_B, predicted_B, labels_B.new_full(labels_B.shape, counts))
    total = torch.stack(list(sums.values()))
    if world > 1:
        dist.all_reduce(total)
        if selection is not None:
            dist.all_reduce(selection.totals)
    figures = dict(zip(sums, (total / len(images.test)).tolist(), strict=True))
    if selection is None:
        return ImageScore(len(images.test), figures)
    entropies = selection.figures()
    if not has_predictions:
        del entropies["mi_pred"]
    entropies["active_experts"] = float(active_experts(selection.true_MC.sum(1)))
    counts_MC = [[round(count) for count in row] for row in selection.true_MC.tolist()]
    return ImageScore(len(images.test), figures | entropies, counts_MC)
