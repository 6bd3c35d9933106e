"""Where one implementation's time goes, operator by operator."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.comparison import build
from benchmarks.inputs import draw_tokens, draw_weights
from benchmarks.shapes import Shape
from benchmarks.timing import step


def operator_table(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int = 3) -> str:
    """Torch's profiler over ``repeats`` forward and backward passes after two that warm up."""
    implementation = build(name, shape, draw_weights(shape, device), device, dtype)
    hidden_1TD, gradient_1TD = draw_tokens(shape, device, dtype)
    hidden_1TD.requires_grad_()

    def run() -> None:
        step(implementation, hidden_1TD, gradient_1TD)
        implementation.module.zero_grad(set_to_none=True)
        hidden_1TD.grad = None

    for _ in range(2):
        run()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            run()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=40)
