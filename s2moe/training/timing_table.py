"""Where the time of a run went, as a table for the person who reads the end of its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .layer_times import PARTS
from .phases import STEP_PHASES

OCCASIONS = ("checkpoint", "evaluation", "probe")
UNITS = ("tokens", "images")  # what a speed may be of
WAIT_MEANS = "for the slowest process"


def timing_table(events: Sequence[Mapping[str, Any]], unlogged: Mapping[str, float]) -> str:
    """The table of all events of a metrics.jsonl, earlier sessions of a resumed run included.

    Args:
        unlogged: seconds of checkpoints and the like after the last event, by `time/...`.
    """
    weighted, before = [], 0
    for event in events:
        if "time/forward" in event:
            weighted.append((event["step"] - before, event))
            before = event["step"]
    if not weighted:
        return ""
    step_seconds = sum(_mean(weighted, f"time/{name}") or 0.0 for name in (*STEP_PHASES, "other"))
    rows = []
    for name in (*STEP_PHASES, "other"):
        rows.append(_row(weighted, name, step_seconds, WAIT_MEANS if name == "wait" else ""))
        if name == "backward":
            rows += [_row(weighted, part, step_seconds, "sampled, within the two above") for part in PARTS.values()]
    head = f"  {'ms a step':16}{'mean':>10}{'slowest process':>18}{'share':>8}"
    return "\n".join([head, *filter(None, rows), *_totals(events, weighted, unlogged)])


def _row(weighted: Sequence[tuple[int, Mapping[str, Any]]], name: str, step_seconds: float, note: str) -> str:
    mean, slowest = (_mean(weighted, f"time/{name}{end}") for end in ("", "_slowest"))
    if mean is None or slowest is None:
        return ""
    label = f"  {name}" if name in PARTS.values() else name
    line = f"  {label:16}{1e3 * mean:>10.1f}{1e3 * slowest:>18.1f}{mean / max(step_seconds, 1e-9):>8.1%}  {note}"
    return line.rstrip()


def _totals(
    events: Sequence[Mapping[str, Any]],
    weighted: Sequence[tuple[int, Mapping[str, Any]]],
    unlogged: Mapping[str, float],
) -> list[str]:
    lines = []
    for name in OCCASIONS:
        key = f"time/{name}"
        seconds = sum(event.get(key, 0.0) for event in events) + unlogged.get(key, 0.0)
        if seconds:
            lines.append(f"  {name}: {seconds:,.1f} s in all")
    unit = next(unit for unit in UNITS if f"{unit}_per_second" in weighted[0][1])
    speed = [f"{_harmonic(weighted, f'{unit}_per_second'):,.0f} {unit}/s"]
    if (mfu := _mean(weighted, "mfu")) is not None:
        speed.append(f"MFU {mfu:.1%}")
    if (imbalance := _mean(weighted, "expert_parallel/imbalance")) is not None:
        worst = max(event.get("expert_parallel/imbalance_max", 0.0) for _, event in weighted)
        speed.append(f"busiest rank's experts {imbalance:.2f} x the mean ({worst:.2f} at worst)")
    memory = max(event["memory_gib"] for _, event in weighted)
    return [*lines, "  " + ", ".join([*speed, f"at most {memory:.2f} GiB a process"])]


def _mean(weighted: Sequence[tuple[int, Mapping[str, Any]]], key: str) -> float | None:
    """Mean over the events that have the figure, each weighted with its steps."""
    values = [(steps, event[key]) for steps, event in weighted if event.get(key) is not None]
    total = sum(steps for steps, _ in values)
    return sum(steps * value for steps, value in values) / total if total else None


def _harmonic(weighted: Sequence[tuple[int, Mapping[str, Any]]], key: str) -> float:
    """A speed over all steps: their time is what adds up."""
    total = sum(steps for steps, _ in weighted)
    return total / sum(steps / event[key] for steps, event in weighted)
