"""The run's facts, tables for people, JSON for programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import Row, Summary
from s2moe.training.hardware import device_name


def header(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """When, where and with what: taken before anything is timed."""
    facts: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "load_average": round(os.getloadavg()[0], 2),
    }
    for package in ("torch", "transformers", "deepspeed"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def header_text(facts: dict[str, Any]) -> str:
    """The facts, on three lines."""
    versions = ", ".join(f"{name} {facts[name] or '-'}" for name in ("torch", "transformers", "deepspeed"))
    return (
        f"{facts['date']}  {facts['device']}, {facts['cores']} cores\n"
        f"{facts['dtype']}, {facts['threads']} threads, load average {facts['load_average']} at start\n{versions}"
    )


def table(rows: Sequence[Row]) -> str:
    """One shape: wall time of forward and backward (median, interquartile range, minimum), ratio to the dense MLP."""
    width = max(len(row.implementation) for row in rows)
    lines = [str(rows[0].shape), f"  {'':{width}}  {'ms':>9}  {'spread':>7}  {'fastest':>8}  {'x dense':>7}"]
    for row in rows:
        figures = f"{'-':>9}  {'-':>7}  {'-':>8}  {'-':>7}"
        if row.ms is not None and row.ratio_to_dense is not None:
            figures = f"{row.ms:9.2f}  {row.spread_ms:7.2f}  {row.fastest_ms:8.2f}  {row.ratio_to_dense:7.2f}"
        lines.append(f"  {row.implementation:{width}}  {figures}  {row.note}".rstrip())
    return "\n".join(lines)


def summary_table(summaries: Sequence[Summary]) -> str:
    """A line for each shape."""
    width = max(len(str(summary.shape)) for summary in summaries)
    lines = [f"{'':{width}}  {'smoe/dense':>10}  {'smoe/best peer':>14}  {'s2moe/top-2':>11}  best peer"]
    for summary in summaries:
        figures = (
            f"{_figure(summary.smoe_to_dense):>10}  {_figure(summary.smoe_to_best_peer):>14}  "
            f"{_figure(summary.s2moe_to_top2):>11}"
        )
        lines.append(f"{summary.shape!s:{width}}  {figures}  {summary.best_peer or '-'}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_json(path: Path, facts: dict[str, Any], rows: Sequence[Row], summaries: Sequence[Summary]) -> None:
    """``{"header": {...}, "rows": [...], "summary": [...]}``; a shape is [T, D, F, E, k], times are milliseconds."""
    content = {
        "header": facts,
        "rows": [asdict(row) for row in rows],
        "summary": [asdict(summary) for summary in summaries],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
