"""What a vision run tells the person who started it: before, and at the end."""

from __future__ import annotations

import torch

from s2moe.config.vision import VisionRunConfig

from .console import format_seconds
from .image_evaluation import ImageScore
from .run import Result
from .vision import build_model

NAMES = {
    "error": "test error",
    "loss": "negative log-likelihood, nats",
    "mi_pred": "I(E; Y), bits: expert and the class it predicts",
    "mi_true": "I(E; Y), bits: expert and label",
    "h_s": "H_s, bits: the gate's entropy on an image",
    "h_u": "H_u, bits: entropy of the experts' use",
}


def plan(config: VisionRunConfig) -> str:
    """Images, parameters and steps of a run, as text. The model is built without storage."""
    images = config.open_images()
    config = config.for_images(len(images.train))
    model_config = config.model_config(images)
    with torch.device("meta"):
        model = build_model(config, model_config, parallel=False)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        f"images      {images.name}: {len(images.train):,} to train on, {len(images.test):,} to test on, "
        f"{images.channels} x {images.image_size} x {images.image_size}, {len(images.classes)} classes",
        f"model       {config.model['kind']}, {total:,} parameters",
        *(f"  {name:10}{count:,}" for name, count in parts.items() if count),
        f"training    {config.training.steps:,} steps of {config.training.global_batch:,} images, "
        f"{config.training.steps * config.training.global_batch / len(images.train):.1f} epochs"
        if config.training.steps is not None
        else "",
        f"directory   {config.directory}",
    ]
    return "\n".join(rows)


def report(config: VisionRunConfig, result: Result) -> str:
    """The closing text of a finished run."""
    assert isinstance(result.score, ImageScore)
    head = (
        f"{result.state.step:,} steps, {result.state.samples:,} images, {format_seconds(result.state.seconds)} of "
        f"training; scored on {result.score.images:,} test images:"
    )
    width = max(len(NAMES.get(name, name)) for name in result.score.figures)
    rows = [f"  {NAMES.get(name, name):{width}}  {value:.4f}" for name, value in sorted_figures(result.score.figures)]
    return "\n\n".join(["\n".join([head, *rows]), result.timing, f"run directory: {result.directory}"])


def sorted_figures(figures: dict[str, float]) -> list[tuple[str, float]]:
    """The figures that have names of their own first, in the order of NAMES."""
    order = {name: place for place, name in enumerate(NAMES)}
    return sorted(figures.items(), key=lambda item: order.get(item[0], len(order)))
