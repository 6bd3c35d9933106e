"""Pictures of a run's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from s2moe import drawing
from s2moe.training.heat_map import selection

CORRUPTION, SIMILARITY, SELECTION = "corruption.png", "similarity.png", "selection.png"
SIMILARITY_TITLES = {
    "weights_cosine": "cosine of weights",
    "outputs_cosine": "cosine of centred outputs",
    "outputs_cka": "linear CKA of outputs",
}


def corruption(report: dict[str, Any], directory: Path) -> None:
    """Accuracy against severity, a line a corruption; clean images as the dashed line."""
    canvas, axis = drawing.subplots(figsize=(5.6, 3.8))
    for kind in dict.fromkeys(row["kind"] for row in report["corruption"]):
        rows = [row for row in report["corruption"] if row["kind"] == kind]
        axis.plot([row["severity"] for row in rows], [row["accuracy"] for row in rows], "o-", label=kind)
    axis.axhline(1 - report["clean"]["error"], ls="--", color="black", lw=1, label="clean")
    axis.set(xlabel="severity", ylabel="accuracy", title=f"{report['run']}: corrupted test images", ylim=(0, 1.02))
    axis.set_xticks(sorted({row["severity"] for row in report["corruption"]}))
    axis.legend(frameon=False)
    drawing.save(canvas, directory / CORRUPTION)


def experts(report: dict[str, Any], directory: Path) -> None:
    """How alike experts are, and which one serves which class."""
    similarity = report["experts"]["similarity"]
    canvas, axes = drawing.subplots(1, len(similarity), figsize=(3.6 * len(similarity), 3.2))
    for axis, (name, of) in zip(axes, similarity.items(), strict=True):
        image = axis.imshow(of["matrix"], vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=f"{SIMILARITY_TITLES[name]}, mean {of['mean']:.3f}", xlabel="expert", ylabel="expert")
        axis.title.set_fontsize(9)
    canvas.colorbar(image, ax=axes, shrink=0.8)
    drawing.save(canvas, directory / SIMILARITY)
    counts = np.asarray(report["experts"]["selection"])
    title = f"I(E; Y) {report['clean']['mi_true']:.2f} bits"
    canvas = selection(counts, range(len(counts)), tuple(report["classes"]), title)
    drawing.save(canvas, directory / SELECTION)
