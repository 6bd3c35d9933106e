"""Torch's profiler as this project uses it."""

from __future__ import annotations

import os

import torch
from torch.profiler import ProfilerActivity, profile


def make_profiler(device: torch.device) -> profile:
    """A profiler of what the host does and, on a GPU, of its kernels. Not started."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells standard error of every start and stop
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)
