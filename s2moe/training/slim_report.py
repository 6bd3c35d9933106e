"""What `launcher/compare.py slim` leaves: slim.json, slim.md and slim.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2moe import drawing
from s2moe.config import ConfigError
from s2moe.data.units import unit_of

from .run_directory import report_directory

REPORT_FILE, TABLE_FILE, FIGURE_FILE = "slim.json", "slim.md", "slim.png"
FILES = (REPORT_FILE, (TABLE_FILE, FIGURE_FILE))


def write_report(out: Path, report: dict[str, Any]) -> list[Path]:
    """Write the three files and return their paths.

    Raises:
        ConfigError: they cannot be written.
    """
    paths = [out / name for name in (REPORT_FILE, TABLE_FILE, FIGURE_FILE)]
    try:
        with report_directory(out, *FILES):
            paths[0].write_text(json.dumps(report, allow_nan=False, indent=1) + "\n", encoding="utf-8")
            paths[1].write_text(table(report), encoding="utf-8")
            draw(paths[2], report)
    except OSError as error:
        raise ConfigError(f"cannot write the report to {out}: {error}") from error
    return paths


def table(report: dict[str, Any]) -> str:
    """A Markdown table, one row a checkpoint and k', and what its figures mean. The trained k is bold."""
    names = list(report["conventions"])
    compared = comparable(report)
    lines = [
        f"| checkpoint | k' | {unit_of(report['symbol'])} | "
        + " | ".join(f"MACs, {name} (M)" for name in names)
        + " | latency, ms | × trained |"
        + (f" × {report['checkpoints'][0]['label']} |" if compared else ""),
        "| --- " * (5 + len(names) + compared) + "|",
    ]
    for checkpoint in report["checkpoints"]:
        for point in checkpoint["points"]:
            number = str(point["experts_per_token"])
            k = f"**{number}**" if point["experts_per_token"] == checkpoint["trained"] else number
            macs = [f"{point['macs'][name] / 1e6:.3g} ({point['macs_ratio'][name]:.2f})" for name in names]
            lines.append(
                f"| {checkpoint['label']} | {k} | {point['bpc']:.4f} | {' | '.join(macs)} | "
                f"{point['ms']:.1f} ± {point['spread_ms']:.1f} | {point['latency_ratio']:.2f} |"
                + (f" {point['latency_to_first']:.2f} |" if compared else "")
            )
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(report))]) + "\n"


def comparable(report: dict[str, Any]) -> bool:
    """Whether there are several checkpoints, whose times are of as many tokens."""
    checkpoints = report["checkpoints"]
    return len(checkpoints) > 1 and len({checkpoint["latency_tokens"] for checkpoint in checkpoints}) == 1


def notes(report: dict[str, Any]) -> list[str]:
    """What was measured and counted, and what was left out."""
    first, hardware, protocol = report["checkpoints"][0], report["hardware"], report["protocol"]
    repeats = first["points"][0]["repeats"]
    lines = [
        f"{unit_of(report['symbol']).capitalize()} of {report['split']} of {report['corpus']}, "
        f"{report['symbols']:,} {report['symbol']}s, protocol {protocol['name']}. Bold: the k trained with, to which "
        "ratios refer.",
        f"MACs: multiply-accumulates of one token, millions, attending to half of {first['latency_tokens']} positions "
        "on average, and their ratio. " + "; ".join(f"{name}: {text}" for name, text in report["conventions"].items()),
        f"Latency: one forward pass of {first['latency_batch']} x {first['latency_tokens']} tokens, median and "
        f"interquartile range of {repeats} rounds in which all checkpoints and k' take turns; a ratio, to the "
        f"trained k of the same{' or the first' if comparable(report) else ''} checkpoint, is the median of theirs. "
        f"{hardware['device']}, {hardware['threads']} threads, torch {hardware['torch']}.",
    ]
    for checkpoint in report["checkpoints"]:
        lines += [f"{checkpoint['label']}, k' = {k} left out: {why}." for k, why in checkpoint["left_out"].items()]
        lines += [
            f"{checkpoint['label']}, k' = {point['experts_per_token']}: {point['mean_experts']:.2f} experts a token."
            for point in checkpoint["points"]
            if abs(point["mean_experts"] - point["experts_per_token"]) > 0.005
        ]
    return lines


def draw(path: Path, report: dict[str, Any]) -> None:
    """Bits per symbol against multiply-accumulates and against latency, a curve a checkpoint."""
    canvas, (macs, latency) = drawing.subplots(1, 2, figsize=(10.5, 4), sharey=True)
    for checkpoint in report["checkpoints"]:
        points = checkpoint["points"]
        bits = [point["bpc"] for point in points]
        trained = [point["experts_per_token"] for point in points].index(checkpoint["trained"])
        for axis, values in (
            (macs, [point["macs"]["model"] / 1e6 for point in points]),
            (latency, [point["ms"] for point in points]),
        ):
            (line,) = axis.plot(values, bits, "o-", ms=4, label=checkpoint["label"])
            axis.plot(values[trained], bits[trained], "o", ms=10, mfc="none", color=line.get_color())
            for point, value in zip(points, values, strict=True):
                axis.annotate(
                    f"{point['experts_per_token']}",
                    (value, point["bpc"]),
                    textcoords="offset points",
                    xytext=(4, 5),
                    fontsize=8,
                )
    first = report["checkpoints"][0]
    macs.set(xlabel="multiply-accumulates of a token, millions (whole model)", ylabel=unit_of(report["symbol"]))
    latency.set(xlabel=f"ms, forward of {first['latency_batch']} x {first['latency_tokens']} tokens")
    macs.set_title("numbers: experts per token k'; circle: as trained", fontsize=9)
    macs.legend(frameon=False)
    drawing.save(canvas, path)
