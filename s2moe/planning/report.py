"""What a plan tells people and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2moe.config.options import ConfigError
from s2moe.training.engine import deepspeed_config

from .machines import GIB
from .memory import USABLE
from .shapes import Cluster, Shape, refusals

KINDS = (
    *("weights", "gradients", "optimizer", "buffers"),
    *("activations", "logits", "recomputed", "dispatch", "workspace", "context"),
)
PHASES = ("dense", "experts", "memory", "host", "all_to_all", "zero", "optimizer")


def text(shapes: Sequence[Shape], cluster: Cluster, top: int) -> str:
    """The best shapes as a table, the best one in detail, and what was left out."""
    machine = cluster.machine
    fitting = [shape for shape in shapes if shape.fits]
    large = [shape for shape in shapes if shape.memory is not None and not shape.fits]
    refused = [shape for shape in shapes if shape.refusal]
    lines = [
        f"{cluster.world_size} processes: {cluster.machines} machines x {cluster.per_machine} {machine.name}, "
        f"{machine.memory / GIB:.0f} GiB each, of which {USABLE:.0%} are counted on",
        f"efficiency: dense {cluster.efficiency.dense:.0%}, experts {cluster.efficiency.experts:.0%} of the peak "
        f"({cluster.efficiency.source})",
        f"links: {machine.link / 1e9:,.0f} GB/s within a machine, {machine.network / 1e9:,.1f} GB/s between machines; "
        f"coefficient of variation of expert loads {cluster.load_cv:g}",
        "",
        f"{len(shapes)} shapes: {len(fitting)} fit, {len(large)} need more memory, {len(refused)} are not possible",
        "",
    ]
    shown = fitting[:top] or large[:top]
    if shown:
        head = f"  {'ZeRO':>4}{'EP':>5}{'micro':>7}{'recompute':>11}{'GiB':>8}{'s/step':>9}{'p95':>9}{'tokens/s':>13}"
        lines += [head, *(_row(shape) for shape in shown)]
    if fitting:
        lines += ["", "the best in detail", *_detail(fitting[0])]
    elif large:
        lines += ["", "none fits; the smallest in detail", *_detail(large[0])]
        lines.append("  more GPUs, a larger GPU, a shorter training.sequence_length or bf16 would help")
    if refused:
        lines += ["", "not possible, among others (--json has all)", *(f"  {reason}" for reason in refusals(refused))]
    return "\n".join(lines)


def _row(shape: Shape) -> str:
    assert shape.memory is not None
    assert shape.time is not None
    recompute = "yes" if shape.checkpointing else "no"
    return (
        f"  {shape.zero_stage:>4}{shape.expert_parallel:>5}{shape.micro_batch:>7}{recompute:>11}"
        f"{shape.memory.total / GIB:>8.1f}{shape.time.total:>9.3f}{shape.time.p95:>9.3f}"
        f"{shape.tokens_per_second:>13,.0f}"
    )


def _detail(shape: Shape) -> list[str]:
    assert shape.memory is not None
    assert shape.time is not None
    assert shape.imbalance is not None
    volume = shape.time.communication.volume
    memory = ", ".join(f"{kind} {getattr(shape.memory, kind) / GIB:.2f}" for kind in KINDS)
    seconds = ", ".join(f"{phase.replace('_', '-')} {getattr(shape.time, phase):.4f}" for phase in PHASES)
    sent = ", ".join(f"{kind.replace('_', ' ')} {value / GIB:.2f}" for kind, value in asdict(volume).items())
    imbalance = shape.imbalance
    return [
        f"  GiB a process:          {memory}; {shape.memory.total / GIB:.2f} at once",
        f"  GiB sent a step:        {sent}; {volume.total / GIB:.2f} in all",
        f"  seconds a step:         {seconds}; {shape.time.total:.4f} in all",
        f"  busiest rank's experts: {imbalance.mean:.2f} x the mean over a step (p95 {imbalance.p95:.2f}), "
        f"{imbalance.peak:.2f} at worst",
        f"  settings:               {' '.join(shape.overrides())}",
    ]


def as_json(shapes: Sequence[Shape], cluster: Cluster) -> dict[str, Any]:
    """Everything, best first, in bytes and seconds."""
    return {
        "cluster": asdict(cluster) | {"world_size": cluster.world_size},
        "shapes": [_shape_json(shape) for shape in shapes],
    }


def _shape_json(shape: Shape) -> dict[str, Any]:
    settings = {
        "zero_stage": shape.zero_stage,
        "expert_parallel": shape.expert_parallel,
        "micro_batch": shape.micro_batch,
        "activation_checkpointing": shape.checkpointing,
    }
    if shape.memory is None or shape.time is None or shape.imbalance is None:
        return {**settings, "possible": False, "refusal": shape.refusal}
    time = asdict(shape.time)
    volume = time.pop("communication")["volume"]
    return {
        **settings,
        "possible": True,
        "fits": shape.fits,
        "tokens_per_second": shape.tokens_per_second,
        "memory": asdict(shape.memory),
        "seconds": time | {"total": shape.time.total},
        "bytes_sent": volume,
        "imbalance": asdict(shape.imbalance),
        "overrides": shape.overrides(),
    }


def write_best(shapes: Sequence[Shape], cluster: Cluster, directory: Path) -> list[Path]:
    """Write the best shape's DeepSpeed configuration and its settings; the files.

    Raises:
        ConfigError: no shape fits, or the directory cannot be written.
    """
    best = next((shape for shape in shapes if shape.fits), None)
    if best is None or best.config is None:
        raise ConfigError("--write: no shape fits into memory, so there is nothing to write")
    files = {
        "deepspeed.json": json.dumps(deepspeed_config(best.config, cluster.world_size), indent=1) + "\n",
        "overrides.txt": "\n".join(best.overrides()) + "\n",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write: cannot write {directory}: {error.strerror}") from error
    return [directory / name for name in files]
