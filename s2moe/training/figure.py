"""A picture of a run, drawn from its metrics.jsonl: learning curve, load of the experts, S2MoE's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2moe import drawing
from s2moe.data.units import unit_of

from . import metrics_log
from .run_symbol import symbol_of_run

CURVES_FILE = "curves.png"
CURVES = {"bpc": "", "error": "error", "task_loss": "loss"}  # what is drawn, the first that there is, and its unit
STOCHASTIC = {"gate_mean": "gate", "agreement": "routing agreement", "infonce_accuracy": "InfoNCE accuracy"}


def draw_run(directory: Path) -> Path:
    """Write ``curves.png`` beside the run's metrics.jsonl and return its path.

    Raises:
        FileNotFoundError: without a metrics.jsonl.
    """
    events = metrics_log.read(directory / "metrics.jsonl")
    training = [event for event in events if "train/loss" in event]
    layers = sorted({int(key[6:].split("/")[0]) for key in training[-1] if key.startswith("layer_")})
    figures = [name for name in STOCHASTIC if layers and f"layer_{layers[0]}/{name}" in training[-1]]
    panels = 1 + bool(layers) + bool(figures)
    canvas, axes = drawing.subplots(1, panels, figsize=(5.2 * panels, 3.6), squeeze=False)
    figure, unit = next((name, text) for name, text in CURVES.items() if f"train/{name}" in training[-1])
    unit = unit or unit_of(symbol_of_run(directory))
    _curve(axes[0, 0], training, *metrics_log.validations(events, figure), figure, unit)
    if layers:
        _load(canvas, axes[0, 1], training, layers)
    if figures:
        for name in figures:
            steps_and_means = [_mean_over_layers(event, name, layers) for event in training]
            axes[0, 2].plot(*zip(*steps_and_means, strict=True), label=STOCHASTIC[name])
        axes[0, 2].set(title="S2MoE, mean over layers", xlabel="step", ylim=(0, 1))
        axes[0, 2].legend(frameon=False)
    path = directory / CURVES_FILE
    drawing.save(canvas, path)
    return path


def _curve(
    axis: Any,
    training: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    closing: dict[str, Any] | None,
    figure: str,
    unit: str,
) -> None:
    train, held_out = f"train/{figure}", f"val/{figure}"
    axis.plot([e["step"] for e in training], [e[train] for e in training], lw=1, label="training")
    if validation:
        last = f"validation: {validation[-1][held_out]:.3f}"
        label = last if closing is None else "validation, of its first part"
        axis.plot([e["step"] for e in validation], [e[held_out] for e in validation], "o-", ms=4, label=label)
    if closing is not None:
        label = f"validation, all of it: {closing[held_out]:.3f}"
        axis.plot(closing["step"], closing[held_out], "D", ms=6, label=label)
    length = next(f"{training[-1][name]:,} {name}" for name in ("tokens", "images") if name in training[-1])
    axis.set(title=length, xlabel="step", ylabel=unit)
    lowest, highest = (of(e[train] for e in training) for of in (min, max))
    if figure == "error":
        axis.set_ylim(0, min(1.0, 1.05 * highest))
    elif lowest > 0:
        axis.set_ylim(0.9 * lowest, min(highest, 3 * lowest))
    axis.legend(frameon=False)


def _load(canvas: Any, axis: Any, training: list[dict[str, Any]], layers: list[int]) -> None:
    """Each expert's share of the assignments over time, one row an expert, layers one below the other; 1 is even."""
    rows = [
        list(column) for layer in layers for column in zip(*(e[f"layer_{layer}/load"] for e in training), strict=True)
    ]
    experts = len(rows) // len(layers)
    steps = training[-1]["step"]
    image = axis.imshow(
        rows, aspect="auto", vmin=0, vmax=2, cmap="viridis", interpolation="nearest", extent=(0, steps, len(rows), 0)
    )
    for number in range(1, len(layers)):
        axis.axhline(number * experts, color="white", lw=1.5)
    axis.set_yticks([(number + 0.5) * experts for number in range(len(layers))], [f"layer {layer}" for layer in layers])
    axis.set(title="load of each expert (1 is even)", xlabel="step")
    canvas.colorbar(image, ax=axis, pad=0.02)


def _mean_over_layers(event: dict[str, Any], name: str, layers: list[int]) -> tuple[int, float]:
    values = [event[f"layer_{layer}/{name}"] for layer in layers]
    return event["step"], sum(values) / len(values)
