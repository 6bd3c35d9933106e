"""Probes of a run at chosen steps: figures to the log, assignments to the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2moe.config.run import RunConfig

from .probe import LayerProbe, ProbeSet, cross_layer, probe, warnings
from .probe_files import PROBES, Assignments, assignments_of, changes, latest, write
from .processes import Processes
from .run_log import RunLog


def take_probe_set(config: RunConfig, stream: Any) -> ProbeSet | None:
    """What a run probes; None where it never does.

    Raises:
        ConfigError: the split is too short.
    """
    if not config.probe.every:
        return None
    return ProbeSet.take(stream, config.probe.tokens, config.training.sequence_length, config.probe.samples)


class LiveProbe:
    """Called with a step, looks into the layers and logs what it saw. Collective."""

    def __init__(
        self,
        config: RunConfig,
        engine: Any,
        probe_set: ProbeSet | None,
        processes: Processes,
        directory: Path,
        log: RunLog,
    ) -> None:
        self._engine, self._processes, self._log = engine, processes, log
        self._batch, self._probe_set, self._directory = config.evaluation.batch, probe_set, directory / PROBES
        self._warned = False

    def __call__(self, step: int) -> None:
        assert self._probe_set is not None
        self._engine.eval()
        layers = probe(self._engine, self._probe_set, self._batch, self._processes.device)
        if not layers:  # another process, or a model without SMoE layers
            return
        if not self._warned:
            for warning in warnings(layers, self._probe_set, self._engine.module.config.hidden_size):
                self._log.say(f"note: {warning}")
            self._warned = True
        fingerprint = self._probe_set.fingerprint()
        now = assignments_of(step, fingerprint, layers)
        self._log.probe(step, values(layers, latest(self._directory, step, fingerprint), now), matrices(layers))
        try:
            write(self._directory, now)
        except OSError as error:  # one probe is not worth the run
            self._log.say(f"note: the assignments of this probe could not be kept: {error}")


def values(layers: Sequence[LayerProbe], before: Assignments | None, now: Assignments) -> dict[str, Any]:
    """The figures of a probe as metrics.jsonl has them: `layer_3/probe_margin`, `probe/fluctuation`, ...

    Fluctuations are those since the probe before; without one they are left out.
    """
    answer: dict[str, Any] = {}
    if before is not None and before.order_LTK.shape[:2] == now.order_LTK.shape[:2]:
        for name, by_layer in changes(before, now).items():
            answer |= {f"layer_{layer}/probe_{name}": value for layer, value in zip(now.layers, by_layer, strict=True)}
            answer[f"probe/{name}"] = sum(by_layer) / len(by_layer)
    for layer in layers:
        answer[f"layer_{layer.layer}/probe_load"] = [round(load, 4) for load in layer.load_E]
        answer |= {f"layer_{layer.layer}/probe_{name}": value for name, value in layer.figures.items()}
    return answer


def matrices(layers: Sequence[LayerProbe]) -> dict[str, Any]:
    """Every layer's matrices by name, and those between layers."""
    answer = {
        f"layer_{layer.layer}/probe_{name}": matrix.tolist()
        for layer in layers
        for name, matrix in layer.matrix.items()
    }
    return answer | {f"probe/cross_layer_{name}": matrix.tolist() for name, matrix in cross_layer(list(layers)).items()}
