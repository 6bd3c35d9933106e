"""Names of devices, and the peak speeds that MFU (the part that the model's own FLOPs reach) is measured against."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

# Dense matrix products, FLOP/s, from the vendors' data sheets (without sparsity), by a part of the
# device's name, in whole words (an RTX A4000 is no A40); the first match counts. fp16 equals bf16 on
# all of them; fp32 is without TF32, which PyTorch leaves off by default.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    # name, bf16, fp32
    ("B200", 2250e12, 75e12),
    ("GH200", 989e12, 67e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 31.2e12),
    ("A40", 150e12, 37.4e12),
    ("V100", 125e12, 15.7e12),
    ("T4", 65e12, 8.1e12),
    ("RTX 4090", 165e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s for matrix products of `precision`; None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device), precision)


def peak_flops_of(name: str, precision: str) -> float | None:
    """The same for a device's name."""
    for part, half, single in _PEAKS:
        if re.search(rf"\b{re.escape(part)}\b", name):
            return single if precision == "fp32" else half
    return None


def device_name(device: torch.device) -> str:
    """What times were measured on: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
