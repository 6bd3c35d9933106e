"""`metrics.jsonl`: one JSON object per log event, each with its `step`, in the order of steps.

The file stays true through interruptions: a resumed run first drops the lines of steps that it is
about to repeat, and a line that a killed process left half-written.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends events to a metrics file; `step` is the step that the run continues from."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        truncate(path, step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one event. A number that is not finite is written as null, which JSON has a word for."""
        event = {"step": step} | {key: _finite(value) for key, value in values.items()}
        self._file.write(json.dumps(event, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def truncate(path: Path, step: int) -> None:
    """Drop the events after `step` and every line that is not a complete event."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    if len(kept) == len(lines) and path.read_bytes()[-1:] in (b"", b"\n"):
        return
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
