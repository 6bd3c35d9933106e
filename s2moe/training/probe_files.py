"""The assignments of each probe of a run, kept so that routing fluctuation outlives an interruption.

`RUN/probes/step-00000100.npz` holds, for every SMoE layer and token of the probe set, the token's experts, heaviest
first (int16; -1 where a token has fewer than others). About two bytes an assignment before compression.

Legend: L layers, T tokens, K most experts of a token, E experts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s2moe.config import ConfigError
from s2moe.metrics.fluctuation import fluctuation, set_fluctuation

from .probe import LayerProbe

PROBES = "probes"
_FILE = re.compile(r"step-(\d{8,})\.npz")


@dataclass(frozen=True)
class Assignments:
    """Which experts the tokens of a probe set had at a step."""

    step: int
    fingerprint: str  # of the probe set
    num_experts: int
    layers: tuple[int, ...]
    order_LTK: Tensor  # int64, heaviest first, -1 for none

    @property
    def target_LT(self) -> Tensor:
        return self.order_LTK[..., 0]

    @property
    def selected_LTE(self) -> Tensor:
        shape = (*self.order_LTK.shape[:2], self.num_experts + 1)
        selected = torch.zeros(shape, dtype=torch.bool)
        number_LTK = self.order_LTK.where(self.order_LTK >= 0, self.num_experts)
        return selected.scatter_(2, number_LTK, True)[..., :-1]


def assignments_of(step: int, fingerprint: str, layers: Sequence[LayerProbe]) -> Assignments:
    """Of a probe of a model with SMoE layers."""
    most = max(layer.order_TK.shape[1] for layer in layers)
    order_LTK = torch.full((len(layers), len(layers[0].order_TK), max(most, 1)), -1)
    for row, layer in enumerate(layers):
        order_LTK[row, :, : layer.order_TK.shape[1]] = layer.order_TK
    experts = layers[0].selected_TE.shape[1]
    return Assignments(step, fingerprint, experts, tuple(layer.layer for layer in layers), order_LTK)


def write(directory: Path, assignments: Assignments) -> Path:
    """Write the file of a probe; it is complete or absent."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{assignments.step:08d}.npz"
    temporary = directory / f".tmp-{path.name}"
    np.savez_compressed(
        temporary,
        fingerprint=assignments.fingerprint,
        num_experts=assignments.num_experts,
        layers=np.array(assignments.layers),
        order=assignments.order_LTK.numpy().astype(np.int16),
    )
    os.replace(temporary, path)
    return path


def read(path: Path) -> Assignments:
    """One file, of which nothing is executed. Raises ConfigError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Assignments(
                _step(path),
                str(file["fingerprint"]),
                int(file["num_experts"]),
                tuple(file["layers"].tolist()),
                torch.from_numpy(file["order"].astype(np.int64)),
            )
        if found.order_LTK.dim() != 3 or len(found.order_LTK) != len(found.layers):
            raise ValueError("not a number for each layer, token and choice")
    except Exception as error:  # a damaged archive ends in errors of any kind
        reason = " ".join(str(error).split())
        raise ConfigError(f"the probe {path} is damaged ({reason}): remove it, or bring back a copy") from error
    return found


def files(directory: Path) -> list[Path]:
    """The files of a run's probes, by step."""
    found = [path for path in directory.iterdir() if _FILE.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found)


def read_all(directory: Path, fingerprint: str | None = None) -> list[Assignments]:
    """All probes of a run by step, of one probe set: the given one, or that of the last file."""
    every = [read(path) for path in files(directory)]
    fingerprint = fingerprint or (every[-1].fingerprint if every else "")
    return [assignments for assignments in every if assignments.fingerprint == fingerprint]


def latest(directory: Path, before: int, fingerprint: str) -> Assignments | None:
    """The last probe before a step, if it is of the same probe set."""
    earlier = [path for path in files(directory) if _step(path) < before]
    found = read(earlier[-1]) if earlier else None
    return found if found is not None and found.fingerprint == fingerprint else None


def remove_after(directory: Path, step: int) -> None:
    """Remove the probes of steps that a resumed run is about to repeat, and a half-written one."""
    for path in files(directory):
        if _step(path) > step:
            path.unlink()
    for path in directory.glob(".tmp-*"):
        path.unlink()


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def changes(before: Assignments, now: Assignments) -> dict[str, list[float]]:
    """By layer: fluctuation of targets and of sets of experts between two probes of one probe set."""
    one_LTE, two_LTE = before.selected_LTE, now.selected_LTE
    return {
        "fluctuation": [float(fluctuation(a, b)) for a, b in zip(before.target_LT, now.target_LT, strict=True)],
        "set_fluctuation": [float(set_fluctuation(a, b)) for a, b in zip(one_LTE, two_LTE, strict=True)],
    }
