"""Small vision runs, as functions that a test can start on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from s2moe.config import load
from s2moe.config.vision import VisionRunConfig
from s2moe.training.image_evaluation import evaluate_images
from s2moe.training.processes import Processes
from s2moe.training.vision import build_model, train_vision

MIXTURE = {
    "data.name": "digits",
    "model.kind": "mixture",
    "model.architecture": "digits",
    "training.steps": 6,
    "training.global_batch": 32,
    "evaluation.every": 3,
    "evaluation.batch": 60,
    "checkpoint.every": 2,
    "logging.every": 1,
    "logging.tensorboard": False,
}


def score(settings: dict[str, Any]) -> dict[str, float]:
    """The figures of a model with its initial weights, on all ranks' test images."""
    config = load(VisionRunConfig, None, [f"{key}={value}" for key, value in settings.items()])
    images = config.open_images()
    torch.manual_seed(0)
    model = build_model(config, config.model_config(images)).eval()
    processes = Processes(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return evaluate_images(model, images, config.evaluation.batch, processes, config.seed).figures


def run(output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank: a run called `run` with MIXTURE and `settings`, of which None takes one out."""
    overrides = {"name": "run", "output_dir": output, **MIXTURE, **settings}
    config = load(VisionRunConfig, None, [f"{key}={value}" for key, value in overrides.items() if value is not None])
    if dist.is_initialized():
        processes = Processes(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    else:
        processes = Processes(0, 0, 1, torch.device("cpu"))
    result = train_vision(config, processes)
    return {
        "finished": result.finished,
        "step": result.state.step,
        "figures": result.score.figures if result.score else None,
        "hf": str(result.hf) if result.hf else None,
    }
