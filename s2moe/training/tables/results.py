"""What the runs of a table came to: means and deviations over seeds, beside the published figures; tests of pairs."""

from __future__ import annotations

import csv
import io
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2moe.config import ConfigError, to_dict
from s2moe.config.plain_yaml import read_yaml
from s2moe.config.vision import VisionRunConfig
from s2moe.metrics.specialisation import ese_of_bits
from s2moe.training import metrics_log
from s2moe.training.agreement import changed_settings
from s2moe.training.details import REPORT_TEXT
from s2moe.training.vision import EVALUATION_FILE, read_evaluation

from .spec import Gathered, Numbers, Order, Stage, Table

CSV_FILE, TEXT_FILE = "results.csv", "table.md"
FIRST_COLUMNS = ("row", "seed")
SETTINGS_FILE = "table.yaml"  # what the table asked of a run
ELSEWHERE = {"data": ("source", "dir"), "training": ("timeout_minutes",)}  # settings that do not change a result


@dataclass(frozen=True)
class Run:
    """A finished run of a row."""

    row: str
    seed: int
    figures: dict[str, float]
    evaluation: dict[str, Any]


def settings_of(config: VisionRunConfig) -> dict[str, Any]:
    """The settings that decide a run's results, as plain values."""
    tree = to_dict(config)
    for section, names in ELSEWHERE.items():
        tree[section] = {name: value for name, value in tree[section].items() if name not in names}
    weights = tree["init"]["weights"]
    if weights is not None:  # where the table's directory lies does not matter
        tree["init"]["weights"] = "/".join(Path(weights).parts[-3:])
    for name in ("output_dir", "checkpoint", "logging", "profile"):
        del tree[name]
    return tree


def changed_since(stage: Stage) -> str:
    """For the user: in what the table's settings of a run differ from those that it was begun with; empty if nowhere.

    Raises:
        ConfigError: what it was begun with can't be read.
    """
    file = stage.config.directory / SETTINGS_FILE
    if not file.is_file():
        return ""
    before = read_yaml(file)
    if not isinstance(before, dict):
        raise ConfigError(f"{file}: does not say how the run was begun: remove its directory")
    return changed_settings(before, settings_of(stage.config))


def is_finished(stage: Stage) -> bool:
    """Whether the run is there."""
    return (stage.config.directory / EVALUATION_FILE).is_file() and (stage.config.directory / "hf").is_dir()


def read_run(stage: Stage) -> Run:
    """The figures of a finished run: those of its evaluation, training error and loss over about the last epoch, the
    seconds, and the test error of the stage that it began with (`error_of_stage_before`)."""
    directory = stage.config.directory
    evaluation = read_evaluation(directory)
    figures = dict(evaluation["figures"])
    training = [event for event in metrics_log.read(directory / "metrics.jsonl") if "train/loss" in event]
    for name in ("error", "task_loss"):
        if f"train/{name}" in training[-1]:
            figures[f"train_{name}"] = over_last_epoch(training, f"train/{name}")
    if "h_s" in figures:
        figures |= ese_of_bits(figures["h_s"], len(evaluation["selection"]))
    if "h_s_before" in figures:
        before = ese_of_bits(figures["h_s_before"], len(evaluation["selection"]))
        figures |= {f"{name}_before": value for name, value in before.items()}
    weights = stage.config.init.weights
    if weights is not None and (Path(weights) / EVALUATION_FILE).is_file():
        earlier = read_evaluation(Path(weights))["figures"]
        if "error" in earlier:
            figures["error_of_stage_before"] = earlier["error"]
    if "error" in figures:
        figures["accuracy"] = 1 - figures["error"]
    figures["seconds"] = training[-1]["seconds"]
    return Run(stage.row, stage.seed, figures, evaluation)


def over_last_epoch(events: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean over the steps of the log events that end in the last epoch; each is the mean since the event before it."""
    starts = [0, *(event["step"] for event in events[:-1])]
    last = [
        (event["step"] - start, event[name])
        for start, event in zip(starts, events, strict=True)
        if name in event and event["epoch"] > events[-1]["epoch"] - 1
    ]
    return sum(steps * value for steps, value in last) / sum(steps for steps, _ in last)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation (of n - 1); no deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def numbers(runs: Sequence[Run], figures: Mapping[str, str]) -> Numbers:
    """Mean and deviation of each figure that all of the runs have."""
    return {
        name: mean_and_deviation([run.figures[name] for run in runs])
        for name in figures
        if runs and all(name in run.figures for run in runs)
    }


def to_csv(table: Table, runs: Sequence[Run]) -> str:
    """One line a run with every figure."""
    names = sorted({name for run in runs for name in run.figures}, key=lambda n: (n not in table.figures, n))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *names])
    for run in runs:
        writer.writerow([run.row, run.seed, *(run.figures.get(name, "") for name in names)])
    return text.getvalue()


def is_csv(path: Path) -> bool:
    """Whether a file is one that `to_csv` made."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().startswith(",".join(FIRST_COLUMNS))
    except (OSError, ValueError):
        return False


FILES = (CSV_FILE, (TEXT_FILE, "boxes.png", "selection.png", "similarity.png"), is_csv)


def to_markdown(table: Table, runs: Sequence[Run], how: str) -> str:
    """The table: one for each figure, then the claims."""
    by_row = {row.name: [run for run in runs if run.row == row.name] for row in table.rows}
    lines = [f"# {table.title}", "", how, ""]
    if table.note:
        lines += [table.note.strip(), ""]
    for figure, name in table.figures.items():
        if any(figure in numbers(found, table.figures) for found in by_row.values()):
            lines += _figure_table(table, by_row, figure, name)
    if table.gathered is not None:
        lines += _gathered(table, table.gathered, runs)
    if table.orders:
        lines += _orders(table, by_row)
    notes = [f"- {row.label}: {row.note.strip()}" for row in table.rows if row.note]
    return "\n".join([*lines, *notes, ""])


def details(table: Table, reports: Mapping[str, Path], directory: Path) -> list[str]:
    """Links to the reports on rows' first runs, as lines for the end of table.md in `directory`."""
    if not reports:
        return []
    lines = ["**Details**: the first run of each row", ""]
    for row in table.rows:
        if row.name in reports:
            place = reports[row.name].relative_to(directory).as_posix()
            pictures = sorted(path.name for path in reports[row.name].glob("*.png"))
            links = [f"[report]({place}/{REPORT_TEXT})", *(f"[{name[:-4]}]({place}/{name})" for name in pictures)]
            lines.append(f"- {row.label}: {', '.join(links)}")
    return [*lines, ""]


def _figure_table(table: Table, by_row: Mapping[str, Sequence[Run]], figure: str, name: str) -> list[str]:
    has_training = figure == "error"
    columns = ["row", "n", "here: mean ± sd", *(["run of the lowest training error"] if has_training else [])]
    columns += ["published", "all runs of the published configuration"]
    lines = [f"**{name}**", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in table.rows:
        found = by_row[row.name]
        cells = [row.label, str(len(found)), _text(numbers(found, table.figures).get(figure))]
        if has_training:
            trained = [run for run in found if "train_error" in run.figures]
            best = min(trained, key=lambda run: run.figures["train_error"], default=None)
            cells.append("" if best is None else f"{best.figures['error']:.4f}")
        cells += [_text(row.published.get(figure)), _text(row.corrected.get(figure))]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _gathered(table: Table, gathered: Gathered, runs: Sequence[Run]) -> list[str]:
    by, figure = (table.figures.get(name, name) for name in (gathered.by, gathered.figure))
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.row in gathered.rows and {gathered.by, gathered.figure} <= run.figures.keys():
            found.setdefault(round(run.figures[gathered.by]), []).append(run.figures[gathered.figure])
    if not found:
        return []
    lines = [f"**{figure}, by {by}**", "", f"| {by} | n | here: mean ± sd | published | n |", "|" + " --- |" * 5]
    for value in sorted({*found, *gathered.published}):
        here = found.get(value, [])
        *published, count = gathered.published.get(value, (math.nan, math.nan, ""))
        cells = [str(value), str(len(here)), _text(mean_and_deviation(here) if here else None)]
        cells += [_text((published[0], published[1])) if count else "", str(count)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _text(number: tuple[float, float | None] | None) -> str:
    if number is None:
        return ""
    mean, deviation = number
    digits = 4 if abs(mean) < 1 else 3
    return f"{mean:.{digits}f}" + ("" if deviation is None or math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def _orders(table: Table, by_row: Mapping[str, Sequence[Run]]) -> list[str]:
    lines = [
        "**Which orders hold**",
        "",
        "Difference: second row minus first, of runs with the same seed. p of the paired t-test and of Wilcoxon's "
        "signed-rank test, two-sided.",
        "",
        "| claim | published | all runs published | here | difference | t-test | Wilcoxon |",
        "|" + " --- |" * 7,
    ]
    for order in table.orders:
        lower, higher = table.row(order.lower), table.row(order.higher)
        ours = [numbers(by_row[row.name], table.figures) for row in (lower, higher)]
        cells = [
            f"{order.claim}: {_compared(table, order)}",
            _holds(order, lower.published, higher.published),
            _holds(order, lower.corrected, higher.corrected),
            _holds(order, *ours),
            *paired(by_row[order.lower], by_row[order.higher], order.figure, order.higher_figure),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _compared(table: Table, order: Order) -> str:
    lower, higher = table.row(order.lower).label, table.row(order.higher).label
    name = table.figures.get(order.figure, order.figure)
    if order.higher_figure == order.figure:
        return f"{name} of {lower} < {higher}"
    return f"{name} of {lower} < {table.figures.get(order.higher_figure, order.higher_figure)} of {higher}"


def _holds(order: Order, lower: Numbers, higher: Numbers) -> str:
    if order.figure not in lower or order.higher_figure not in higher:
        return ""
    return "yes" if lower[order.figure][0] < higher[order.higher_figure][0] else "no"


def paired(
    first: Sequence[Run], second: Sequence[Run], figure: str, second_figure: str | None = None
) -> tuple[str, str, str]:
    """Mean difference ± deviation over common seeds, and the p-values of the paired t-test and Wilcoxon's test.

    Args:
        second_figure: of the second runs, where it is another one.
    """
    name = second_figure or figure
    other = {run.seed: run.figures[name] for run in second if name in run.figures}
    differences = [
        other[run.seed] - run.figures[figure] for run in first if figure in run.figures and run.seed in other
    ]
    if not differences:
        return "", "", ""
    text = _text(mean_and_deviation(differences))
    if len(differences) < 3 or not any(differences):
        return text, "", ""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal differences, or few of them
        t_test = stats.ttest_1samp(differences, 0.0).pvalue
        wilcoxon = stats.wilcoxon(differences).pvalue
    return text, f"{t_test:.3g}", f"{wilcoxon:.3g}"
