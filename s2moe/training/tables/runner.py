"""Trains what is missing of a table's runs, and writes the table.

Every run is a directory, and a run that was interrupted goes on from its checkpoint. So the same command continues a
table that was killed, and adds seeds or rows to one that is finished.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2moe.config import ConfigError, to_yaml
from s2moe.training.console import format_seconds
from s2moe.training.details import REPORT_DIRECTORY, is_reported, report_on
from s2moe.training.errors import TrainingError
from s2moe.training.run_directory import VISION, report_directory, require_kind, require_reportable
from s2moe.training.vision import build_model

from . import figures, results
from .spec import Stage, Table, plan_runs, read_table
from .workers import Outcome, train_all


def run_table(
    name: str,
    runs: int | None = None,
    jobs: int = 1,
    rows: Sequence[str] | None = None,
    epochs: float | None = None,
    source: str | None = None,
    output: str = "runs/tables",
    overrides: Sequence[str] = (),
    dry_run: bool = False,
) -> Path:
    """Make the table called `name` in `output`/`name`, and return that directory.

    Args:
        runs: of each row, or as many as it has; None: as many as published.
        jobs: runs at a time.
        rows: of the table; None: all.
        epochs: of every stage, instead of the published number.
        overrides: settings for every run.
        dry_run: only say what there would be to train.

    Raises:
        ConfigError, CorpusError: the table, a setting or the data does not allow it.
        TrainingError: runs failed; the table holds the others.
    """
    whole = read_table(name)
    table = whole.chosen(rows)
    runs = table.runs if runs is None else runs
    for value, key in ((runs, "--runs"), (jobs, "--jobs")):
        if value < 1:
            raise ConfigError(f"{key}: must be at least 1, got {value}")
    directory = Path(output) / table.name
    chains = plan_runs(table, directory, runs, epochs, source, overrides)
    stages = [stage for chain in chains for stage in chain]
    check(stages)
    require_reportable(directory, *results.FILES)
    missing = [[stage for stage in chain if not results.is_finished(stage)] for chain in chains]
    left = sum(map(len, missing))
    print(f"{table.title}: {len(stages)} runs, {len(stages) - left} of them finished; {directory}", flush=True)
    if dry_run:
        print("\n".join(f"  {stage.label}" for chain in missing for stage in chain))
        return directory
    with report_directory(directory, *results.FILES):
        failed = train_missing(missing, jobs, directory) if left else []
        found = every_chain(whole, directory, max(runs, whole.runs), epochs, source, overrides) or chains
        finished = [chain[-1] for chain in found if all(map(results.is_finished, chain))]
        table = whole.chosen([*{stage.row: None for stage in finished}, *(row.name for row in table.rows)])
        head = how(table, finished, epochs, overrides)
        write(table, finished, directory, head)
        if table.details and report_on_first(finished):
            write(table, finished, directory, head)
    print((directory / results.TEXT_FILE).read_text(encoding="utf-8"))
    print(f"table directory: {directory}", flush=True)
    if failed:
        told = "; ".join(f"{outcome.stage.label}: {outcome.error}" for outcome in failed[:5])
        raise TrainingError(f"{len(failed)} of {left} runs failed: {told}. The same command tries them again")
    return directory


def check(stages: Sequence[Stage]) -> None:
    """Find mistakes before the first run: the data, each model, and finished runs of other settings.

    Raises:
        ConfigError, CorpusError: naming what is wrong.
    """
    seen: dict[str, Any] = {}
    for stage in stages:
        data = str(stage.config.data)
        if data not in seen:
            seen[data] = stage.config.data.open()
        if stage.seed == stages[0].seed:
            import torch

            config = stage.config.for_images(len(seen[data].train))
            with torch.device("meta"):
                build_model(config, config.model_config(seen[data]), parallel=False)
        require_kind(stage.config.directory, VISION)
        changes = results.changed_since(stage)
        if changes:
            raise ConfigError(
                f"{stage.config.directory} was begun with other settings than the table has now ({changes}): "
                "choose another --output, or remove it"
            )


def train_missing(chains: Sequence[Sequence[Stage]], jobs: int, directory: Path) -> list[Outcome]:
    """Train the runs, showing how far it is; returns the failed ones.

    Raises:
        ConfigError: a run found a mistake that the others would meet too.
    """
    for stage in (stage for chain in chains for stage in chain):
        stage.config.directory.mkdir(parents=True, exist_ok=True)
        file = stage.config.directory / results.SETTINGS_FILE
        if not file.exists():  # otherwise `check` found it to be the same
            file.write_text(to_yaml(results.settings_of(stage.config)), encoding="utf-8")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, _interrupt)
    failed: list[Outcome] = []
    progress = Progress(chains)
    log = directory / "runs.log"
    try:
        for outcome in train_all(chains, jobs, log):
            progress.done(outcome)
            if outcome.fatal:
                raise ConfigError(f"{outcome.stage.label}: {outcome.error}")
            if outcome.error:
                failed.append(outcome)
    finally:
        progress.close()
    return failed


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class Progress:
    """A bar in a terminal, a line a run elsewhere; the time left is by the epochs that are left."""

    def __init__(self, chains: Sequence[Sequence[Stage]]) -> None:
        self._runs = sum(map(len, chains))
        self._total = sum(stage.config.training.epochs for chain in chains for stage in chain)
        self._done, self._count, self._begin = 0.0, 0, time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} epochs [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(total=self._total, file=sys.stderr, dynamic_ncols=True, bar_format=layout)

    def done(self, outcome: Outcome) -> None:
        """A run has ended."""
        self._count += 1
        epochs = outcome.stage.config.training.epochs
        self._done += epochs
        told = f"{outcome.stage.label} failed: {outcome.error}" if outcome.error else outcome.stage.label
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._count}/{self._runs} runs")
            self._bar.update(epochs)
            if outcome.error:
                self._bar.write(told, file=sys.stderr)
            return
        left = (time.monotonic() - self._begin) / self._done * max(0.0, self._total - self._done)
        print(f"{self._count}/{self._runs} runs  {told}  {format_seconds(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def every_chain(
    table: Table, directory: Path, runs: int, epochs: float | None, source: str | None, overrides: Sequence[str]
) -> list[list[Stage]]:
    """The runs with these settings of all of the table's rows, so that a few rows or seeds do not replace what is
    written of the others; none where the settings do not suit every row."""
    try:
        chains = plan_runs(table, directory, runs, epochs, source, overrides)
    except ConfigError:
        return []
    return [chain for chain in chains if not any(map(results.changed_since, chain))]


def how(table: Table, finished: Sequence[Stage], epochs: float | None, overrides: Sequence[str]) -> str:
    """What was run, for the head of the table."""
    sets = sorted({stage.config.data.name for stage in finished})
    runs = max(Counter(stage.row for stage in finished).values(), default=0)
    length = "the published number of epochs" if epochs is None else f"{epochs:g} epochs a stage"
    changes = f", {' '.join(overrides)}" if overrides else ""
    fewer = sum(row.runs is not None and row.runs < runs for row in table.rows)
    least = f", fewer of {fewer} rows" if fewer else ""
    return f"{runs} runs a row (the table's own: {table.runs}){least}, {length}, on {', '.join(sets)}{changes}."


def first_runs(finished: Sequence[Stage]) -> dict[str, Stage]:
    """The first finished run of each row, in the order in which the table plans them."""
    found: dict[str, Stage] = {}
    for stage in finished:
        found.setdefault(stage.row, stage)
    return found


def report_on_first(finished: Sequence[Stage]) -> bool:
    """Report on one run of each row, where that has not been done. Whether there was one to report on.

    Raises:
        ConfigError: a report cannot be made.
    """
    missing = [stage for stage in first_runs(finished).values() if not is_reported(stage.config.directory)]
    for number, stage in enumerate(missing, start=1):
        print(f"report {number}/{len(missing)}  {stage.label}", file=sys.stderr, flush=True)
        data = stage.config.data  # where the images are now, not where the run found them
        report_on(stage.config.directory, data.source, downloads=data.dir)
    return bool(missing)


def write(table: Table, finished: Sequence[Stage], directory: Path, text: str) -> None:
    """Write results.csv, table.md and the pictures."""
    found = [results.read_run(stage) for stage in finished]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / results.CSV_FILE).write_text(results.to_csv(table, found), encoding="utf-8")
    reports = {
        row: stage.config.directory / REPORT_DIRECTORY
        for row, stage in first_runs(finished).items()
        if table.details and is_reported(stage.config.directory)
    }
    lines = [results.to_markdown(table, found, text), *results.details(table, reports, directory)]
    (directory / results.TEXT_FILE).write_text("\n".join(lines), encoding="utf-8")
    figures.draw(table, found, directory)
