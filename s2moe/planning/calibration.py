"""What of a device's peak its kernels reach: measured figures where there are any, else stated assumptions.

benchmarks/results/*.json hold times of a dense MLP and of the SMoE layer on the devices that were tried; what
launcher/doctor.py --json wrote holds speeds of links and matrix products of the cluster itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2moe.config.options import ConfigError
from s2moe.places import ROOT

from .communication import REACHED
from .machines import Machine

RESULTS = ROOT / "benchmarks" / "results"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ASSUMED_DENSE, ASSUMED_EXPERTS = 0.55, 0.40  # of the peak, forward and backward, at large sizes
CPU_NAMES = re.compile(r"EPYC|Xeon|CPU|Ryzen|Graviton|aarch64|x86", re.IGNORECASE)


@dataclass(frozen=True)
class Efficiency:
    """Parts of the peak that dense layers and experts reach, and where they come from."""

    dense: float
    experts: float
    source: str


def calibrate(
    machine: Machine, precision: str, measured: Path | None = None, results: Path = RESULTS
) -> tuple[Machine, Efficiency]:
    """The machine with measured speeds in place of the vendor's, and what its kernels reach.

    Raises:
        ConfigError: `measured` is not what the doctor writes.
    """
    is_cpu = machine.name == "cpu"
    rows = [row for row in _rows(results) if _is_of(row["device"], machine, is_cpu) and row["precision"] == precision]
    dense, experts = (_fastest(rows, name) for name in ("dense", "smoe"))
    if is_cpu and dense:  # whose peak nobody states; the results' processes had several threads, a plan's have one
        machine = replace(machine, peaks=(dense, dense))
    efficiency = Efficiency(
        ASSUMED_DENSE, ASSUMED_EXPERTS, "assumed: no benchmark of this device in benchmarks/results"
    )
    if dense and experts:
        peak = machine.peak(precision)
        source = f"measured: {', '.join(sorted({row['file'] for row in rows}))}"
        efficiency = Efficiency(min(1.0, dense / peak), min(1.0, experts / peak), source)
    if measured is not None:
        machine = _with_measured(machine, measured)
    return machine, efficiency


def _rows(results: Path) -> Iterable[dict[str, Any]]:
    for file in sorted(results.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        header = content.get("header", {}) if isinstance(content, dict) else {}
        if "device" not in header or header.get("dtype") not in PRECISIONS:
            continue
        for row in content.get("rows", []):
            if row.get("ms") and len(row.get("shape", ())) == 5:
                common = {"file": file.name, "device": header["device"], "precision": PRECISIONS[header["dtype"]]}
                yield {**row, **common, "threads": header.get("threads") or 1}


def _is_of(device: str, machine: Machine, is_cpu: bool) -> bool:
    if is_cpu:
        return CPU_NAMES.search(device) is not None
    return re.search(rf"\b{re.escape(machine.device)}\b", device) is not None


def _fastest(rows: Sequence[dict[str, Any]], implementation: str) -> float | None:
    """FLOP/s at the shape that suits it best; on a CPU of one thread. Three matrices, forward and backward."""
    speeds = []
    for row in rows:
        tokens, width, hidden, _, choices = row["shape"]
        if row["implementation"] == implementation:
            speeds.append(18 * tokens * width * hidden * choices / (row["ms"] * 1e-3) / row["threads"])
    return max(speeds, default=None)


def _with_measured(machine: Machine, path: Path) -> Machine:
    try:
        links = json.loads(path.read_text(encoding="utf-8"))["measured"]["all_to_all"]
        changes: dict[str, Any] = {}
        several = "within a machine" in links
        for name, link in links.items():
            kind = "network" if several and name == "of all processes" else "link"
            changes[kind] = link["bandwidth"] / REACHED  # it was reached
            changes[f"{kind}_latency"] = link["latency"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--measured: {path} is not what launcher/doctor.py --json writes: {error!r}") from error
    if not changes:
        raise ConfigError(
            f"--measured: {path} comes from one process: run the doctor on the allocation, see its --help"
        )
    return replace(machine, **changes)
