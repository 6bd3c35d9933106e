"""Reading the log of a run for comparison with another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2moe.training.metrics_log import read

MEASURED = {"seconds", "tokens_per_second", "images_per_second", "mfu", "memory_gib"}  # by a clock, or of the machine


def reproducible_events(run: Path) -> list[dict[str, Any]]:
    """All log events of a run directory, without what depends on the machine and its speed."""
    return [
        {key: value for key, value in event.items() if key not in MEASURED and not key.startswith("time/")}
        for event in read(run / "metrics.jsonl")
    ]
