"""A run's report for people, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2moe.models.vision.vmoe_curve import PRIORITY_NAMES
from s2moe.training.heat_map import MOST_CLASSES

from .figures import CORRUPTION, SELECTION, SIMILARITY, SIMILARITY_TITLES


def to_markdown(report: dict[str, Any]) -> str:
    """All parts that the report has."""
    lines = [
        f"# Run {report['run']}",
        "",
        f"{report['kind']}, step {report['step']:,}, {report['images']:,} test images of {report['set']}, in blocks of "
        f"{report['block']}.",
        "",
        *_table(("figure", "clean test images"), [(name, f"{value:.4f}") for name, value in report["clean"].items()]),
    ]
    for name, write in (("corruption", _corruption), ("experts", _experts), ("curve", _curve), ("vae", _vae)):
        if name in report:
            lines += write(report)
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]


def _corruption(report: dict[str, Any]) -> list[str]:
    kinds = dict.fromkeys(row["kind"] for row in report["corruption"])
    severities = list(dict.fromkeys(row["severity"] for row in report["corruption"]))
    rows = []
    for kind in kinds:
        accuracy = [row["accuracy"] for row in report["corruption"] if row["kind"] == kind]
        rows.append((kind, *(f"{value:.4f}" for value in (*accuracy, sum(accuracy) / len(accuracy)))))
    return [
        "## Accuracy under corruption",
        "",
        f"Clean: {1 - report['clean']['error']:.4f}. Columns are severities.",
        "",
        *_table(("corruption", *map(str, severities), "mean"), rows),
        f"![accuracy against severity]({CORRUPTION})",
        "",
    ]


def _experts(report: dict[str, Any]) -> list[str]:
    found = report["experts"]
    before = found["weights_cosine_before_training"]
    rows = [
        *((f"{SIMILARITY_TITLES[name]}, mean over pairs", of["mean"]) for name, of in found["similarity"].items()),
        *([("cosine of weights before training", before)] if before is not None else []),
        ("entropy of the routing (ESE), nats; high: flexible", found["ese_routing"]),
        ("the same over ln M", found["ese_normalised"]),
        ("entropy of the class given the expert, nats; low: specialised", found["ese_class"]),
    ]
    lines = ["## Experts", "", *_table(("figure", "value"), [(name, f"{value:.4f}") for name, value in rows])]
    lines += [f"![how alike experts are]({SIMILARITY})", ""]
    if len(report["classes"]) <= MOST_CLASSES:
        lines += ["Test images of each class that select an expert:", ""]
        cells = [(str(number), *map(str, counts)) for number, counts in enumerate(found["selection"])]
        lines += _table(("expert", *report["classes"]), cells)
    return [*lines, f"![which expert serves which class]({SELECTION})", ""]


def _curve(report: dict[str, Any]) -> list[str]:
    head = ("k", "priority", "C", "places of an expert", "dropped", "MFLOPs an image", "accuracy", "loss, nats")
    rows = [
        (
            str(row["experts_per_token"]),
            PRIORITY_NAMES[row["priority"]] if row["capacity_factor"] is not None else "any",
            "dropless" if row["capacity_factor"] is None else f"{row['capacity_factor']:g}",
            "" if row["capacity_factor"] is None else f"{row['capacity']:.0f}",
            f"{row['dropped']:.1%}",
            f"{row['flops'] / 1e6:.3f}",
            f"{row['accuracy']:.4f}",
            f"{row['loss']:.4f}",
        )
        for row in report["curve"]
    ]
    return [
        "## Compute and accuracy of one checkpoint",
        "",
        "Places are those of the first block's routing groups, after rounding; FLOPs are of the assignments that were "
        "kept. All figures: [vmoe_curve.csv](vmoe_curve.csv).",
        "",
        *_table(head, rows),
        "![accuracy against compute](vmoe_curve.png)",
        "",
    ]


def _vae(report: dict[str, Any]) -> list[str]:
    found = report["vae"]
    error, probes = found["error"], found["probes"]
    rows = [
        ("experts configured", f"{found['experts']['configured']}"),
        ("experts active", f"{found['experts']['active']}"),
        ("squared error of an image, its own expert", f"{error['recon']:.3f}"),
        ("of the mixture of all", f"{error['recon_soft']:.3f}"),
        ("of another image's expert", f"{error['recon_shuffled']:.3f}"),
        ("of the best expert", f"{error['recon_best']:.3f}"),
        ("I(E; Y), bits", f"{found['bits']['information']:.4f}"),
        ("purity", f"{found['purity']:.4f}"),
        *(
            (f"linear probe: {name.replace('_', ' ')}", f"{of['accuracy']:.4f} (commonest label: {of['majority']:.4f})")
            for name, of in probes.items()
        ),
    ]
    pictures = [f"![{name}]({name}.png)" for name in ("reconstructions", "selection", "tsne")]
    return [
        "## Experts and latent space",
        "",
        *_table(("figure", "value"), rows),
        "All figures: [vae_report.json](vae_report.json).",
        "",
        *pictures,
        "",
    ]
