"""What a check found, on one process and on all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
_ORDER: tuple[Status, ...] = ("ok", "warn", "fail")
_SHOWN = 3  # different values of one check


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        value: what was found, for people.
        remedy: what to do about it; empty where all is well.
        number, unit: what was measured; processes' numbers are shown as a range.
        alike: whether all processes must find the same.
    """

    check: str
    status: Status
    value: str
    remedy: str = ""
    number: float | None = None
    unit: str = ""
    alike: bool = False


def measured(check: str, number: float, unit: str, status: Status = "ok", remedy: str = "") -> Finding:
    """A finding that is a number."""
    return Finding(check, status, f"{_short(number)} {unit}", remedy if status != "ok" else "", number, unit)


def judge(check: str, holds: bool, value: str, remedy: str, otherwise: Status = "fail") -> Finding:
    """``ok`` where `holds`, else `otherwise` with the remedy."""
    return Finding(check, "ok" if holds else otherwise, value, "" if holds else remedy)


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="ok")


def merge(by_rank: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """One finding for each check, in the order in which processes made them.

    Args:
        hosts: each rank's machine, named where ranks differ.
    """
    order: list[str] = []
    for findings in by_rank:
        order += [finding.check for finding in findings if finding.check not in order]
    return [_merged([(r, f) for r, fs in enumerate(by_rank) for f in fs if f.check == check], hosts) for check in order]


def _merged(found: Sequence[tuple[int, Finding]], hosts: Sequence[str]) -> Finding:
    status = worst([finding for _, finding in found])
    first = next(finding for _, finding in found if finding.status == status)
    numbers = [(finding.number, rank) for rank, finding in found if finding.number is not None]
    if len(numbers) == len(found):
        (low, low_rank), (high, _) = min(numbers), max(numbers)
        value = f"{_short(low)} {first.unit}"
        if _short(low) != _short(high):
            value = f"{_short(low)} ({_place(low_rank, hosts)}) to {_short(high)} {first.unit}"
        return Finding(first.check, status, value, first.remedy, low, first.unit)
    values: dict[str, list[int]] = {}
    for rank, finding in found:
        values.setdefault(finding.value, []).append(rank)
    if len(values) == 1:
        return first
    shown = [f"{value} ({_places(ranks, hosts)})" for value, ranks in list(values.items())[:_SHOWN]]
    text = "; ".join(shown) + ("; ..." if len(values) > _SHOWN else "")
    if first.alike:
        return Finding(
            first.check, "fail", text, first.remedy or "must be the same on all machines: use one environment"
        )
    return Finding(first.check, status, text, first.remedy)


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = [_place(rank, hosts) for rank in ranks[:_SHOWN]]
    return ", ".join(names) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _place(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} on {hosts[rank]}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
