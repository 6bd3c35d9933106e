"""`launcher/evaluate.py --report collapse`: every collapse and routing metric of a model, as JSON and as pictures.

Of the weights alone: what the SMoE layers do with a probe set (training/probe.py), and bits per symbol at other
numbers of experts per token. Of the run directory they come from, where there is one: load and S2MoE's figures in
training (metrics.jsonl), routing fluctuation (probes/). Of other runs given beside it: inter-run consistency.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from s2moe.config import ConfigError
from s2moe.config.plain_yaml import read_yaml
from s2moe.data.units import unit_of
from s2moe.metrics.collapse import THRESHOLD
from s2moe.metrics.consistency import inter_run_consistency
from s2moe.metrics.fluctuation import last_fluctuation, settled
from s2moe.metrics.load import dead_experts
from s2moe.metrics.similarity import SIGMA

from . import metrics_log
from .export import HF_DIRECTORY
from .probe import LayerProbe, ProbeSet, cross_layer, probe, warnings
from .probe_files import PROBES, Assignments, changes, read_all
from .report_plots import PICTURES, draw_report
from .run_directory import report_directory, require_reportable
from .slim import slimmability
from .standalone import load_model_and_split, protocol_of
from .weights import Weights

REPORT_FILE = "collapse.json"
WINDOW = 100  # steps over which loads are accumulated for consistency and dead experts

Event = dict[str, Any]


def report_collapse(options: argparse.Namespace) -> dict[str, Any]:
    """Write the report as `launcher/evaluate.py` was asked to; returns it with the paths of its files.

    Raises:
        ConfigError, CorpusError: something is missing or does not fit together.
    """
    loaded = load_model_and_split(options)
    run = run_directory(loaded.weights)
    out = options.out or (run / "collapse" if run is not None else None)
    if out is None:
        raise ConfigError(f"{loaded.weights.description} is not in a run directory: say where to write with --out")
    require_reportable(out, REPORT_FILE, PICTURES)
    loads = [training_events(directory) for directory in _runs(run, options.against)]
    model, moe = loaded.model, loaded.model.config.moe_config()
    window = training_length(run) or model.config.max_position_embeddings
    probe_set = ProbeSet.take(loaded.stream, options.probe_tokens, window, options.probe_samples)
    try:
        layers = probe(model, probe_set, options.batch, loaded.device, options.experts_per_token)
    except ValueError as error:  # not all routers know every k'
        raise ConfigError(str(error)) from error
    if not layers:
        raise ConfigError(f"{loaded.weights.description} has no SMoE layer to report on")
    kept = read_all(run / PROBES) if run is not None else []
    events = training_events(run) if run is not None else []
    report = {
        "weights": loaded.weights.description,
        "corpus": loaded.corpus.name,
        "split": options.split,
        "symbol": loaded.corpus.metadata.symbol,
        "settings": {
            "probe_tokens": probe_set.tokens,
            "window": window,
            "probe_samples": len(probe_set.sample_M),
            "probe_set": probe_set.fingerprint(),
            "experts_per_token": options.experts_per_token or moe.experts_per_token,
            "num_experts": moe.num_experts,
            "method": moe.title(),
            "pseudo_inverse_threshold": THRESHOLD,
            "rbf_sigma": SIGMA,
            "load_window_steps": WINDOW,
        },
        "notes": warnings(layers, probe_set, model.config.hidden_size),
        "layers": [_layer(layer) for layer in layers],
        "mean": {
            name: sum(layer.figures[name] for layer in layers) / len(layers)
            for name in layers[0].figures
            if all(name in layer.figures for layer in layers)
        },
        "cross_layer": {name: matrix.tolist() for name, matrix in cross_layer(layers).items()},
        "slimmability": slimmability(loaded, options.slim, protocol_of(options, model), moe.experts_per_token),
        "fluctuation": fluctuations(kept) if len(kept) > 1 else None,
        "training": in_training(events) if events else None,
        "consistency": consistency(loads, [str(run), *map(str, options.against)]) if options.against else None,
    }
    report = _finite(report)
    _write(out, report, layers)
    return report | {"files": sorted(str(path) for path in out.iterdir())}


def run_directory(weights: Weights) -> Path | None:
    """The run that weights belong to, where they still lie in its directory."""
    if weights.checkpoint is not None:
        return weights.checkpoint.path.parent.parent
    assert weights.hf is not None
    parent = weights.hf.resolve().parent
    return parent if weights.hf.name == HF_DIRECTORY and (parent / "metrics.jsonl").is_file() else None


def training_length(run: Path | None) -> int | None:
    """`training.sequence_length` of a run, in whose windows it was probed."""
    try:
        return None if run is None else int(read_yaml(run / "config.yaml")["training"]["sequence_length"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def training_events(run: Path) -> list[Event]:
    """The training events of a run's log.

    Raises:
        ConfigError: it has none.
    """
    try:
        events = [event for event in metrics_log.read(run / "metrics.jsonl") if "train/loss" in event]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the log of the run {run}: {error}") from error
    if not events:
        raise ConfigError(f"{run / 'metrics.jsonl'} has no training event")
    return events


def fluctuations(kept: Sequence[Assignments]) -> dict[str, Any]:
    """Of a run's probes: what changed from each to the next, and when tokens changed for the last time."""
    steps = [assignments.step for assignments in kept]
    between = [changes(before, now) for before, now in itertools.pairwise(kept)]
    answer: dict[str, Any] = {"steps": steps, "layers": list(kept[-1].layers)}
    for name in ("fluctuation", "set_fluctuation"):
        by_step = [change[name] for change in between]
        answer[name] = [sum(values) / len(values) for values in by_step]
        answer[f"{name}_by_layer"] = [list(column) for column in zip(*by_step, strict=True)]
    target_LPT = torch.stack([assignments.target_LT for assignments in kept], dim=1)
    last_LT = torch.stack([last_fluctuation(steps, target_PT) for target_PT in target_LPT])
    answer["last_fluctuation"] = last_LT.double().mean(1).tolist()  # by layer
    answer["settled"] = settled(last_LT, steps)
    answer["settled_by_layer"] = [settled(last_T, steps) for last_T in last_LT]
    return answer


def in_training(events: Sequence[Event]) -> dict[str, Any]:
    """The last training event's figures of every layer, S2MoE's among them, and experts dead over the window."""
    last = events[-1]
    layers: dict[str, dict[str, Any]] = {}
    for key, value in last.items():
        if key.startswith("layer_"):
            number, name = key.removeprefix("layer_").split("/", 1)
            layers.setdefault(number, {})[name] = value
    recent = [event for event in events if event["step"] > last["step"] - WINDOW]
    for number, figures in layers.items():
        loads = [event[f"layer_{number}/load"] for event in recent]
        figures["dead_experts_window"] = dead_experts(loads, len(loads))
    return {"step": last["step"], "layers": layers}


def consistency(runs: Sequence[Sequence[Event]], names: Sequence[str]) -> dict[str, Any]:
    """Inter-run consistency of every layer, at the end of each WINDOW of steps that all runs have.

    Raises:
        ConfigError: the runs have other layers or numbers of experts.
    """
    accumulated = [accumulated_loads(events) for events in runs]
    for name, other in zip(names[1:], accumulated[1:], strict=True):
        sizes = [{layer: len(next(iter(at.values()))) for layer, at in run.items()} for run in (accumulated[0], other)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"--against {name}: experts by layer are {sizes[1]}, of {names[0]} they are {sizes[0]}: "
                "loads can be compared among runs of one architecture only"
            )
    layers = sorted(accumulated[0])
    common = set.intersection(*(set(run[layers[0]]) for run in accumulated)) if layers else set()
    if not common:
        raise ConfigError(f"--against: {', '.join(names)} have no {WINDOW} steps of training in common")
    steps = sorted(common)
    by_layer = {
        layer: [float(inter_run_consistency(torch.tensor([run[layer][step] for run in accumulated]))) for step in steps]
        for layer in layers
    }
    return {"runs": list(names), "steps": steps, "by_layer": {str(layer): ic for layer, ic in by_layer.items()}}


def accumulated_loads(events: Sequence[Event]) -> dict[int, dict[int, list[float]]]:
    """By layer and last step of each window: the experts' loads, summed over the window's steps.

    An event's load is that of all steps since the event before; it counts for the window it ends in. A last window
    that is not complete is left out, unless it is the only one.
    """
    sums: dict[int, dict[int, list[float]]] = {}
    before = 0
    for event in events:
        steps, end = event["step"] - before, math.ceil(event["step"] / WINDOW) * WINDOW
        before = event["step"]
        for key, load in event.items():
            if not key.endswith("/load") or not key.startswith("layer_"):
                continue
            layer = sums.setdefault(int(key.removeprefix("layer_").split("/")[0]), {})
            total = layer.setdefault(end, [0.0] * len(load))
            layer[end] = [old + steps * new for old, new in zip(total, load, strict=True)]
    for layer in sums.values():
        if len(layer) > 1 and max(layer) > before:
            del layer[max(layer)]
    return sums


def _runs(run: Path | None, against: Sequence[Path]) -> list[Path]:
    if against and run is None:
        raise ConfigError("--against compares the logs of runs: give a run directory as --checkpoint")
    return [run, *against] if against and run is not None else []


def _layer(layer: LayerProbe) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        **layer.figures,
        "load": layer.load_E,
        "hidden_singular_values": layer.sigma_R,
        "matrices": {name: matrix.tolist() for name, matrix in layer.matrix.items()},
    }


def _write(out: Path, report: dict[str, Any], layers: Sequence[LayerProbe]) -> None:
    try:
        with report_directory(out, REPORT_FILE, PICTURES):
            (out / REPORT_FILE).write_text(json.dumps(report, allow_nan=False, indent=1) + "\n", encoding="utf-8")
            draw_report(out, report)
    except OSError as error:
        raise ConfigError(f"cannot write the report to {out}: {error}") from error


def _finite(value: Any) -> Any:
    """Numbers that are not finite as null, which JSON has a word for."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


SUMMARY = (
    ("load_entropy", "load entropy"),
    ("token_entropy", "token entropy"),
    ("collapse_by_expert", "RC by expert"),
    ("collapse_by_target", "RC by target"),
    ("hidden_effective_rank", "effective rank"),
    ("router_cosine", "router cosine"),
    ("output_cosine", "output cosine"),
    ("output_linear_cka", "output CKA"),
)


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines, for people."""
    settings = report["settings"]
    columns = [(name, title) for name, title in SUMMARY if name in report["layers"][0]]
    lines = [
        f"{settings['probe_tokens']} tokens of {report['corpus']} {report['split']}, {report['weights']}",
        "layer" + "".join(f"{title:>16}" for _, title in columns),
    ]
    lines += [
        f"{layer['layer']:>5}" + "".join(f"{_figure(layer[name]):>16}" for name, _ in columns)
        for layer in report["layers"]
    ]
    slim = report["slimmability"]
    bits = ", ".join(f"{k}: {bpc:.4f}" for k, bpc in slim["bpc"].items())
    lines.append(f"{unit_of(report['symbol'])} at k': {bits}")
    lines += [f"k' = {number} left out: {reason}" for number, reason in slim["left_out"].items()]
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
