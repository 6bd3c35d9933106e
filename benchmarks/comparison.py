"""One shape: build every implementation, check what it computes, time them in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import deepspeed_peers, ours, transformers_peers
from benchmarks.agreement import Reference, run
from benchmarks.implementation import Implementation, Unavailable, Weights
from benchmarks.inputs import draw_tokens, draw_weights
from benchmarks.shapes import Shape
from benchmarks.timing import take_turns

DENSE, SMOE, SMOE_TOP2, S2MOE = "dense", "smoe", "smoe_top2", "s2moe"
OURS = (SMOE, SMOE_TOP2, S2MOE)
DEEPSPEED = ("deepspeed_moe", "deepspeed_autoep")


class Disagreement(Exception):
    """Our layer does not compute the reference's function: its time would mean nothing."""


@dataclass
class Row:
    """One implementation at one shape. ``ms`` and what follows from it are None where it was not timed."""

    shape: Shape
    implementation: str
    ms: float | None = None
    spread_ms: float | None = None
    fastest_ms: float | None = None
    repeats: int = 0
    ratio_to_dense: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """A shape's figures of merit; None where one of the two was not timed."""

    shape: Shape
    smoe_to_dense: float | None
    best_peer: str | None
    smoe_to_best_peer: float | None
    s2moe_to_top2: float | None


def known_implementations() -> list[str]:
    """All names, in the order of the table."""
    return [DENSE, *OURS, *transformers_peers.names(), *DEEPSPEED]


def build(name: str, shape: Shape, weights: Weights, device: torch.device, dtype: torch.dtype) -> Implementation:
    """The implementation of that name.

    Raises:
        Unavailable: if it cannot run here, with the reason.
    """
    if name == DENSE:
        return ours.dense(shape, device, dtype)
    if name in (SMOE, SMOE_TOP2):
        choices = shape.experts_per_token if name == SMOE else 2
        layer = ours.smoe(name, shape, weights, choices, dtype)
        if choices != shape.experts_per_token:
            layer.reference = None  # the reference is the shape's own k
        return layer
    if name == S2MOE:
        return ours.s2moe(name, shape, weights, dtype)
    if name in DEEPSPEED:
        return deepspeed_peers.build(name, shape, weights, dtype)
    return transformers_peers.build(name, shape, weights, dtype)


def compare(
    shape: Shape,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    slow_seconds: float,
) -> list[Row]:
    """A row for every name, the dense MLP's first. What takes longer than ``slow_seconds`` is timed once.

    Raises:
        Disagreement: if our layer computes something else than the reference.
    """
    weights = draw_weights(shape, device)
    hidden_1TD, gradient_1TD = draw_tokens(shape, device, dtype)
    reference = Reference(shape, weights, hidden_1TD, gradient_1TD, dtype)
    rows = {name: Row(shape, name) for name in (DENSE, *names) if wanted(name, shape)}
    ready: dict[str, Implementation] = {}
    slow: set[str] = set()
    for name, row in rows.items():
        try:
            implementation = build(name, shape, weights, device, dtype)
            start = time.perf_counter()  # the check is the warm-up, too
            outcome = run(implementation, hidden_1TD, gradient_1TD)
            off = reference.disagreement(implementation.reference, outcome)
            if time.perf_counter() - start > slow_seconds:
                slow.add(name)
        except Exception as error:
            if name in (DENSE, *OURS):
                raise
            row.note = str(error) if isinstance(error, Unavailable) else _reason(error)
            continue
        if reference.agrees(off):
            ready[name] = implementation
            continue
        row.note = f"computes something else than the reference for {off:.1%} of the tokens"
        if name in OURS:
            raise Disagreement(f"{name} at {shape} {row.note}")
    for name, timing in take_turns(ready, hidden_1TD, gradient_1TD, repeats, slow).items():
        row = rows[name]
        row.ms, row.spread_ms, row.fastest_ms = timing.ms, timing.spread_ms, timing.fastest_ms
        row.repeats = timing.repeats
        if timing.repeats < repeats:
            row.note = f"slow, so timed {timing.repeats} instead of {repeats} times"
    dense_ms = rows[DENSE].ms
    for row in rows.values():
        if row.ms is not None and dense_ms is not None:
            row.ratio_to_dense = row.ms / dense_ms
    return list(rows.values())


def summarise(rows: Sequence[Row]) -> Summary:
    """The figures of merit in the rows of one shape."""
    ms = {row.implementation: row.ms for row in rows if row.ms is not None}
    peers = {name: taken for name, taken in ms.items() if name not in (DENSE, *OURS)}
    best = min(peers, key=peers.__getitem__) if peers else None
    top2 = ms.get(SMOE if rows[0].shape.experts_per_token == 2 else SMOE_TOP2)
    return Summary(
        shape=rows[0].shape,
        smoe_to_dense=_ratio(ms.get(SMOE), ms.get(DENSE)),
        best_peer=best,
        smoe_to_best_peer=_ratio(ms.get(SMOE), peers[best] if best else None),
        s2moe_to_top2=_ratio(ms.get(S2MOE), top2),
    )


def wanted(name: str, shape: Shape) -> bool:
    """Whether the shape has a row of that name: smoe_top2, S2MoE's peer, has one only beside another k."""
    return name != SMOE_TOP2 or shape.experts_per_token != 2


def _ratio(ours_ms: float | None, theirs_ms: float | None) -> float | None:
    return ours_ms / theirs_ms if ours_ms is not None and theirs_ms is not None else None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
