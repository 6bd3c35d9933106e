"""Runs side by side, from what their directories hold: `launcher/compare.py runs`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2moe import drawing
from s2moe.config import ConfigError, load
from s2moe.config.run import RunConfig
from s2moe.data.units import UNKNOWN_SYMBOL, unit_of
from s2moe.hub.reading import read_config
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import model_sizes

from . import metrics_log
from .run_directory import report_directory
from .run_symbol import symbol_of_run
from .slim import distinct_labels
from .weights import checkpoint_config, find_weights

REPORT_FILE, TABLE_FILE, FIGURE_FILE = "runs.json", "runs.md", "runs.png"


def compare_runs(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write table, figures and JSON; returns the report with its files' paths.

    Raises:
        ConfigError: a run cannot be read, has no validation yet, or the runs' figures do not compare.
    """
    runs = [read(label, path) for label, path in zip(distinct_labels(paths), paths, strict=True)]
    first = runs[0]
    for run in runs[1:]:
        if run["corpus"] != first["corpus"]:
            raise ConfigError(
                f"{run['label']} was validated on {run['corpus']}, {first['label']} on {first['corpus']}: their "
                "figures do not compare"
            )
        if UNKNOWN_SYMBOL not in (run["symbol"], first["symbol"]) and run["symbol"] != first["symbol"]:
            raise ConfigError(
                f"{run['label']} is scored in {unit_of(run['symbol'])}, {first['label']} in "
                f"{unit_of(first['symbol'])}: their figures do not compare"
            )
    report = {"corpus": first["corpus"], "symbol": first["symbol"], "runs": runs}
    files = [out / name for name in (REPORT_FILE, TABLE_FILE, FIGURE_FILE)]
    try:
        with report_directory(out, REPORT_FILE, (TABLE_FILE, FIGURE_FILE)):
            files[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            files[1].write_text(table(report), encoding="utf-8")
            draw(files[2], report)
    except OSError as error:
        raise ConfigError(f"cannot write the comparison to {out}: {error}") from error
    return report | {"files": [str(path) for path in files]}


def read(label: str, path: Path) -> dict[str, Any]:
    """The figures of a run.

    Raises:
        ConfigError: it cannot be read, or has no validation yet.
    """
    try:
        events = metrics_log.read(path / "metrics.jsonl")
        config = load(RunConfig, path / "config.yaml", written=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no run of launcher/pretrain.py that can be read: {error}") from error
    training = [event for event in events if "train/loss" in event]
    validation, closing = metrics_log.validations(events, "bpc")
    if not training or not validation:
        raise ConfigError(f"{path} has no validation yet")
    last = closing or validation[-1]
    tokens_a_step = config.training.global_batch * config.training.sequence_length
    weights = find_weights(path)
    if weights.hf is not None:
        model = read_config(S2MoEConfig, weights.hf)
    else:
        assert weights.checkpoint is not None
        model = checkpoint_config(weights.checkpoint)
    sizes = model_sizes(model)
    return {
        "label": label,
        "method": model.moe_config().title(),
        "corpus": [Path(config.data.dir).name, config.data.validation],
        "symbol": symbol_of_run(path),
        "step": last["step"],
        "steps": config.training.steps,
        "tokens": last["step"] * tokens_a_step,
        "bpc": last["val/bpc"],
        "symbols": last["val/symbols"],
        "parameters": sizes.total,
        "active": sizes.active,
        "tokens_per_second": statistics.median(event["tokens_per_second"] for event in training),
        "curve": [[event["step"] * tokens_a_step, event["val/bpc"]] for event in validation],
        "closing": None if closing is None else [closing["step"] * tokens_a_step, closing["val/bpc"]],
        "training_curve": [[event["step"] * tokens_a_step, event["train/bpc"]] for event in training],
    }


def table(report: dict[str, Any]) -> str:
    """A Markdown table, one row a run."""
    lines = [
        f"| run | method | {unit_of(report['symbol'])} | {report['symbol']}s scored | parameters, M (active) | "
        "tokens, M | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in report["runs"]:
        unfinished = "" if run["step"] == run["steps"] else f" (step {run['step']:,} of {run['steps']:,})"
        lines.append(
            f"| {run['label']} | {run['method']} | {run['bpc']:.4f}{unfinished} | {run['symbols']:,.0f} | "
            f"{run['parameters'] / 1e6:.3g} ({run['active'] / 1e6:.3g}) | {run['tokens'] / 1e6:.4g} | "
            f"{run['tokens_per_second']:,.0f} |"
        )
    corpus, split = report["corpus"]
    return "\n".join([*lines, "", f"Last validation on {split} of {corpus}; tokens/s: median of the log.", ""])


def draw(path: Path, report: dict[str, Any]) -> None:
    """Validation against tokens, and faintly training. What is over the whole split stands alone."""
    canvas, axis = drawing.subplots(figsize=(6.5, 4.2))
    for run in report["runs"]:
        (line,) = axis.plot(*zip(*run["curve"], strict=True), "o-", ms=4, label=f"{run['label']}, {run['bpc']:.3f}")
        axis.plot(*zip(*run["training_curve"], strict=True), lw=0.7, alpha=0.4, color=line.get_color())
        if run["closing"]:
            axis.plot(*run["closing"], "D", ms=6, color=line.get_color())
    points = [point for run in report["runs"] for point in (*run["curve"], *filter(None, [run["closing"]]))]
    lowest = min(bits for _, bits in points)
    highest = max(bits for run in report["runs"] for _, bits in run["training_curve"])
    axis.set(xlabel="tokens", ylabel=unit_of(report["symbol"]), ylim=(0.9 * lowest, min(highest, 3 * lowest)))
    whole = ", diamond: of the whole split" if any(run["closing"] for run in report["runs"]) else ""
    axis.set_title(f"dots: validation{whole}, thin: training", fontsize=9)
    axis.legend(frameon=False)
    drawing.save(canvas, path)
