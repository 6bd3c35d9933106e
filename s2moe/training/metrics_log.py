"""`metrics.jsonl`: one JSON object per log event, each with its `step`, in the order of steps.

The file stays true through interruptions: a resumed run first drops the lines of steps that it is
about to repeat, and a line that a killed process left half-written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2moe.config import ConfigError
from s2moe.disk import naming


class MetricsLog:
    """Appends events to a metrics file; `step` is the step that the run continues from."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        with naming(path):
            truncate(path, step)
        events = read(path) if path.exists() else []
        self._known = {(step, name) for event in events if event["step"] == step for name in event}
        self._file = path.open("a", encoding="utf-8")

    def has(self, step: int, values: dict[str, Any]) -> bool:
        """Whether an earlier start has written these figures of the step that the run continues from."""
        return any((step, name) in self._known for name in values)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one event. A number that is not finite is written as null, which JSON has a word for."""
        event = {"step": step} | {key: _finite(value) for key, value in values.items()}
        with naming(self.path):
            self._file.write(json.dumps(event, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


def truncate(path: Path, step: int) -> None:
    """Drop the events after `step` and every line that is not a complete event.

    Raises:
        ConfigError: the file is something else.
    """
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no log of a run ({error}): move it away, or bring back a copy") from error
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    if len(kept) == len(lines) and path.read_bytes()[-1:] in (b"", b"\n"):
        return
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics file.

    Raises:
        OSError: it cannot be read.
        ConfigError: a line is no event.
    """
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # not UTF-8, or not JSON
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not all(isinstance(event, dict) and isinstance(event.get("step"), int) for event in events):
        raise ConfigError(f"{path} is damaged: a line of it is no log event with its step")
    return events


def validations(events: Sequence[dict[str, Any]], figure: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The validations that make a curve of `val/FIGURE`, and the closing one where it does not belong to it.

    It does not where it is over another part of the split than the one before: over all of it, at the end of a run
    with `evaluation.max_symbols`. Figures of different texts are no curve.
    """
    found = [event for event in events if event.get(f"val/{figure}") is not None]
    if len(found) > 1 and found[-1].get("val/symbols") != found[-2].get("val/symbols"):
        return found[:-1], found[-1]
    return found, None


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
