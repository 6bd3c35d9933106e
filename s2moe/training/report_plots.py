"""The pictures of a collapse report, drawn from what its JSON holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from s2moe import drawing
from s2moe.data.units import unit_of

SIMILARITIES = {
    "router_cosine": "router rows, cosine",
    "weight_cosine": "weights, cosine",
    "output_cosine": "outputs, cosine",
    "output_linear_cka": "outputs, linear CKA",
    "output_rbf_cka": "outputs, RBF CKA",
}


PICTURES = tuple(
    f"{name}.png"
    for name in ("load", "spectrum", "similarity", "coselection", "slimmability", "fluctuation", "consistency")
)


def draw_report(out: Path, report: dict[str, Any]) -> list[Path]:
    """Write a picture of each part that the report has; those of an earlier report go. Returns their paths."""
    drawers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "load": _load,
        "spectrum": _spectrum,
        "similarity": _similarity,
        "coselection": _coselection,
        "slimmability": _slimmability,
        "fluctuation": _fluctuation,
        "consistency": _consistency,
    }
    written = []
    for name, draw in drawers.items():
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)
        if name in report and report[name] is None:  # what it would show is not there
            continue
        canvas = draw(report)
        drawing.save(canvas, path)
        written.append(path)
    return written


def _load(report: dict[str, Any]) -> Any:
    layers = report["layers"]
    loads = [layer["load"] for layer in layers]
    panels = [("probe set", loads)]
    if report["training"] is not None:
        last = report["training"]["layers"]
        panels.append(
            (f"training, up to step {report['training']['step']}", [last[str(x["layer"])]["load"] for x in layers])
        )
    width = 2 + max(3.0, 0.25 * len(loads[0]))
    canvas, axes = drawing.subplots(
        1,
        len(panels),
        figsize=(width * len(panels), 1.4 + max(1.2, 0.3 * len(loads))),
        squeeze=False,
    )
    for axis, (title, rows) in zip(axes[0], panels, strict=True):
        image = axis.imshow(rows, aspect="auto", vmin=0, vmax=2, cmap="viridis", interpolation="nearest")
        axis.set(title=f"load / mean, {title}", xlabel="expert", ylabel="layer")
        axis.set_yticks(range(len(layers)), [layer["layer"] for layer in layers])
    canvas.colorbar(image, ax=axes[0, -1], extend="max")
    return canvas


def _spectrum(report: dict[str, Any]) -> Any:
    layers = report["layers"]
    numbers = [layer["layer"] for layer in layers]
    canvas, (curves, ranks, collapse) = drawing.subplots(1, 3, figsize=(15, 3.8))
    for layer, colour in zip(layers, _colours(len(layers)), strict=True):
        sigma = np.array(layer["hidden_singular_values"], dtype=float)
        curves.plot(
            np.arange(1, len(sigma) + 1), sigma / sigma[0], color=colour, lw=1.2, label=f"layer {layer['layer']}"
        )
    curves.set(
        title="hidden states entering the router",
        xlabel="singular value",
        ylabel="σ / σ₁",
        yscale="log",
        ylim=(1e-4, 1.5),
    )
    _legend(curves, len(layers))
    for name, label in (
        ("hidden_effective_rank", "hidden states, effective"),
        ("hidden_stable_rank", "hidden states, stable"),
        ("output_effective_rank", "an expert's outputs, effective"),
        ("pooled_output_effective_rank", "all experts' outputs, effective"),
    ):
        ranks.plot(numbers, _column(layers, name), "o-", ms=4, label=label)
    ranks.set(title="rank", xlabel="layer", xticks=numbers, ylim=(0, 1.4 * ranks.get_ylim()[1]))  # room for the legend
    for name, label in (
        ("collapse_by_expert", "classes: assigned expert"),
        ("collapse_by_target", "classes: next token"),
    ):
        collapse.plot(numbers, _column(layers, name), "o-", ms=4, label=label)
    collapse.set(title="Tr(Σ_W Σ_B⁺), smaller is more collapsed", xlabel="layer", xticks=numbers, yscale="log")
    ranks.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    collapse.legend(frameon=False, fontsize=8)
    return canvas


def _similarity(report: dict[str, Any]) -> Any:
    layers = report["layers"]
    names = [name for name in SIMILARITIES if name in layers[0]["matrices"]]
    canvas, axes = drawing.subplots(
        len(layers),
        len(names),
        figsize=(2.5 * len(names) + 0.8, 2.3 * len(layers) + 0.5),
        squeeze=False,
    )
    for row, layer in enumerate(layers):
        for column, name in enumerate(names):
            is_cosine = name.endswith("cosine")
            scale = (
                {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"} if is_cosine else {"vmin": 0, "vmax": 1, "cmap": "viridis"}
            )
            axis = axes[row, column]
            image = axis.imshow(_matrix(layer, name), interpolation="nearest", **scale)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"mean off diagonal {_text(layer.get(name))}", fontsize=8)
            if row == 0:
                axis.set_title(SIMILARITIES[name], fontsize=9)
            if column == 0:
                axis.set_ylabel(f"layer {layer['layer']}")
            if row == len(layers) - 1:
                canvas.colorbar(image, ax=axes[:, column], location="bottom", shrink=0.8, pad=0.02)
    return canvas


def _coselection(report: dict[str, Any]) -> Any:
    layers, across = report["layers"], report["cross_layer"]
    panels = [(f"layer {layer['layer']}: P(column | row)", _matrix(layer, "coselection")) for layer in layers]
    columns = min(4, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)
    canvas, axes = drawing.subplots(rows, columns, figsize=(3.4 * columns, 3.6 * rows), squeeze=False)
    # The diagonal is 1 by definition; the colours are for the rest.
    rest = [matrix[~np.eye(len(matrix), dtype=bool)] for _, matrix in panels if len(matrix) > 1]
    highest = max([float(np.nanmax(part)) for part in rest] + [1e-3])
    for axis, (title, matrix) in zip(axes.flat, panels, strict=False):
        matrix = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
        image = axis.imshow(matrix, vmin=0, vmax=highest, cmap="viridis", interpolation="nearest")
        axis.set_title(title, fontsize=9)
    canvas.colorbar(image, ax=list(axes.flat[: len(panels)]), shrink=0.7)
    axis = axes.flat[len(panels)]
    information = np.array(across["information"], dtype=float)
    image = axis.imshow(information, vmin=0, vmax=1, cmap="magma", interpolation="nearest")
    axis.set_title("shared information of layers' choices", fontsize=9)
    numbers = [layer["layer"] for layer in layers]
    axis.set_xticks(range(len(numbers)), numbers)
    axis.set_yticks(range(len(numbers)), numbers)
    canvas.colorbar(image, ax=axis, shrink=0.7)
    for axis in axes.flat[len(panels) + 1 :]:
        axis.set_axis_off()
    return canvas


def _slimmability(report: dict[str, Any]) -> Any:
    slim = report["slimmability"]
    numbers = [int(number) for number in slim["bpc"]]
    canvas, axis = drawing.subplots(figsize=(5.2, 3.8))
    axis.plot(numbers, list(slim["bpc"].values()), "o-")
    axis.axvline(slim["trained"], color="grey", lw=1, ls="--", label=f"trained with k = {slim['trained']}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.set(
        title=f"{slim['symbols']:,} {report['symbol']}s of {report['split']}",
        xlabel="experts per token k'",
        ylabel=unit_of(report["symbol"]),
    )
    axis.legend(frameon=False)
    return canvas


def _fluctuation(report: dict[str, Any]) -> Any:
    data = report["fluctuation"]
    steps, colours = data["steps"], _colours(len(data["layers"]))
    canvas, (changed, last) = drawing.subplots(1, 2, figsize=(10.5, 3.8))
    for number, layer in enumerate(data["layers"]):
        style = {"color": colours[number], "lw": 1, "ms": 3, "label": f"layer {layer}"}
        changed.plot(steps[1:], data["fluctuation_by_layer"][number], "o-", **style)  # two probes are one point
        last.plot(steps, data["settled_by_layer"][number], "o-", **style)
    changed.plot(steps[1:], data["fluctuation"], "o-", ms=3, color="black", label="all")
    last.plot(steps, data["settled"], "o-", ms=3, color="black", label="all")
    changed.set(
        title="other target expert than at the probe before", xlabel="step", ylabel="fraction of tokens", ylim=(0, None)
    )
    last.set(title="last fluctuation not after this step", xlabel="step", ylabel="cumulative fraction", ylim=(0, 1.02))
    _legend(changed, len(data["layers"]))
    return canvas


def _consistency(report: dict[str, Any]) -> Any:
    data = report["consistency"]
    canvas, axis = drawing.subplots(figsize=(5.8, 3.8))
    for (layer, values), colour in zip(data["by_layer"].items(), _colours(len(data["by_layer"])), strict=True):
        axis.plot(data["steps"], np.array(values, dtype=float), "o-", ms=3, color=colour, label=f"layer {layer}")
    runs = len(data["runs"])
    axis.axhline(1 / runs, color="grey", lw=1, ls="--", label="unrelated runs")
    axis.set(title=f"inter-run consistency of {runs} runs", xlabel="step", ylim=(None, 1.02))
    _legend(axis, len(data["by_layer"]))
    return canvas


def _colours(count: int) -> Any:
    return drawing.colour_map("viridis")(np.linspace(0, 0.9, count))


def _legend(axis: Any, layers: int) -> None:
    axis.legend(frameon=False, fontsize=8, ncols=1 + layers // 9)


def _matrix(layer: dict[str, Any], name: str) -> Any:
    return np.array(layer["matrices"][name], dtype=float)


def _column(layers: list[dict[str, Any]], name: str) -> Any:
    return np.array([layer.get(name) for layer in layers], dtype=float)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
