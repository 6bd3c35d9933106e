"""Tables of vision results: what is trained, what is kept, what is refused, and what comes out."""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml

from s2moe.config import ConfigError
from s2moe.training.tables import results
from s2moe.training.tables.results import (
    SETTINGS_FILE,
    Run,
    changed_since,
    is_finished,
    mean_and_deviation,
    over_last_epoch,
    paired,
    settings_of,
)
from s2moe.training.tables.runner import run_table
from s2moe.training.tables.spec import plan_runs, read_table, table_names
from s2moe.training.vision import EVALUATION_FILE

SMALL = """
title: small
runs: 2
figures: {error: test error, h_s: H_s, h_u: H_u}
boxes: [accuracy, h_s]
base:
  data: {name: digits}
  model: {kind: mixture, architecture: digits}
  training: {epochs: 1, global_batch: 64}
  evaluation: {every_epochs: 0}
  checkpoint: {every: 5}
  logging: {every: 5, tensorboard: false}
rows:
  attentive:
    label: attentive gate
    stages: [{model: {gate: attentive}}]
    published: {error: [.1, .01], h_s: .5}
    corrected: {error: [.12, .02]}
  distilled:
    label: distilled
    after: attentive
    stages: [{model: {frozen: experts}, init: {stage: distil}}]
    published: {error: .2}
orders:
  - {claim: the teacher is better, figure: error, lower: attentive, higher: distilled}
details: true
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("table") / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_table(small, output=str(tmp_path_factory.mktemp("made")))


def written(directory: Path) -> list[dict[str, str]]:
    with (directory / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_table_of_ours_can_be_planned(tmp_path: Path) -> None:
    assert {"mnist", "fmnist", "cifar100", "fmnist_mnist", "snnl", "vmoe", "vae"} <= set(table_names())
    for name in table_names():
        table = read_table(name)
        chains = plan_runs(table, tmp_path, table.runs)
        assert len(chains) == sum(row.runs or table.runs for row in table.rows)
        directories = [stage.config.directory for chain in chains for stage in chain]
        assert len(set(directories)) == len(directories)
        for row in table.rows:
            assert set(row.published) | set(row.corrected) <= set(table.figures), row.name
        for order in table.orders:
            assert order.figure in table.figures, order.claim


def test_stages_begin_with_the_weights_of_the_one_before(tmp_path: Path) -> None:
    for name in ("mnist", "fmnist_mnist"):
        for chain in plan_runs(read_table(name), tmp_path, 2):
            for before, stage in itertools.pairwise(chain):
                assert stage.config.init.weights == str(before.config.directory)
    teacher, student = next(
        c for c in plan_runs(read_table("mnist"), tmp_path, 1) if c[0].row == "distilled_importance"
    )
    assert (teacher.config.model["importance_loss"], student.config.model["importance_loss"]) == (0.4, 0)
    assert (student.config.model["gate"], student.config.model["frozen"]) == ("original", "experts")


def test_a_table_is_written(made: Path) -> None:
    rows = written(made)
    assert [(row["row"], row["seed"]) for row in rows] == [
        ("attentive", "1"), ("distilled", "1"), ("attentive", "2"), ("distilled", "2"),
    ]  # fmt: skip
    errors = [float(row["error"]) for row in rows if row["row"] == "attentive"]
    mean, deviation = mean_and_deviation(errors)
    text = (made / "table.md").read_text(encoding="utf-8")
    assert f"| attentive gate | 2 | {mean:.4f} ± {deviation:.4f} |" in text
    assert "| 0.1000 ± 0.0100 | 0.1200 ± 0.0200 |" in text
    assert "the teacher is better: test error of attentive gate < distilled | yes |" in text
    for name in ("boxes.png", "selection.png", "similarity.png"):
        assert (made / name).stat().st_size > 1000


def test_the_first_run_of_each_row_gets_a_report(made: Path) -> None:
    reported = sorted(path.relative_to(made).as_posix() for path in made.rglob("report.json"))
    assert reported == [f"runs/{row}/seed1/stage1/report/report.json" for row in ("attentive", "distilled")]
    details = (made / "table.md").read_text(encoding="utf-8").split("**Details**")[1]
    links = re.findall(r"\]\((.*?)\)", details)
    assert len(links) == 2 * 4  # the text and three pictures each
    assert all((made / link).is_file() for link in links)
    assert not read_table("mnist").details
    assert all(read_table(name).details for name in ("snnl", "vae", "vmoe"))


def test_finished_runs_are_kept_and_missing_ones_made_again(made: Path, small: str) -> None:
    before, rows = (made / "table.md").read_text(encoding="utf-8"), written(made)
    runs = sorted(made.glob("runs/*/*/*"))
    times = {run: (run / EVALUATION_FILE).stat().st_mtime_ns for run in runs}
    gone = made / "runs" / "distilled" / "seed2" / "stage1"
    (gone / EVALUATION_FILE).unlink()
    reports = {path: path.stat().st_mtime_ns for path in made.rglob("report/*")}
    run_table(small, output=str(made.parent))
    assert {path: path.stat().st_mtime_ns for path in made.rglob("report/*")} == reports
    assert all((run / EVALUATION_FILE).stat().st_mtime_ns == times[run] for run in runs if run != gone)
    assert (made / "table.md").read_text(encoding="utf-8") == before
    assert [row["error"] for row in written(made)] == [row["error"] for row in rows]


def test_a_few_rows_or_seeds_do_not_replace_the_others(made: Path, small: str) -> None:
    before, rows = (made / "table.md").read_text(encoding="utf-8"), written(made)
    run_table(small, runs=1, rows=["attentive"], output=str(made.parent))
    assert (made / "table.md").read_text(encoding="utf-8") == before
    assert written(made) == rows


@pytest.mark.slow
def test_two_workers_train_as_one_does(made: Path, small: str, tmp_path: Path) -> None:
    both = run_table(small, jobs=2, rows=["distilled"], output=str(tmp_path))  # and what it comes after
    theirs = {(row["row"], row["seed"]): row for row in written(made)}
    assert len(written(both)) == 4
    for row in written(both):
        for figure in ("error", "h_s", "h_u", "pes", "train_task_loss"):
            assert row[figure] == theirs[row["row"], row["seed"]][figure]


def test_runs_of_other_settings_are_not_mixed(made: Path, small: str) -> None:
    with pytest.raises(ConfigError, match=r"begun with other settings .*training.epochs 1.0 -> 2"):
        run_table(small, epochs=2, output=str(made.parent))


def test_the_order_of_settings_does_not_matter(small: str, tmp_path: Path) -> None:
    stage = plan_runs(read_table(small), tmp_path, 1)[0][0]
    assert changed_since(stage) == ""
    stage.config.directory.mkdir(parents=True)
    file = stage.config.directory / SETTINGS_FILE
    file.write_text(yaml.safe_dump(settings_of(stage.config), sort_keys=True), encoding="utf-8")
    assert changed_since(stage) == ""
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="does not say how the run was begun"):
        changed_since(stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ["atentive"]}, "has no row 'atentive', did you mean 'attentive'"),
        ({"jobs": 0}, "--jobs: must be at least 1"),
        ({"overrides": ["seed=3"]}, "seed: is decided by the table"),
        ({"overrides": ["optimizer.rl=3"]}, "optimizer.rl: unknown key; did you mean optimizer.lr"),
        ({"overrides": ["model.gate=atentive"]}, "atentive"),
    ],
)
def test_mistakes_end_before_anything_is_trained(
    small: str, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_table(small, output=str(tmp_path), **options)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*/runs"))


def test_an_unknown_table_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no table 'minst', did you mean 'mnist'"):
        read_table("minst")


def test_a_misspelt_key_of_a_table_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(SMALL.replace("label: attentive gate", "lable: attentive gate"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows.attentive: unknown key 'lable', did you mean 'label'"):
        read_table(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("figure: error, lower", "figur: error, lower", r"orders\[0\]: unknown key 'figur', did you mean 'figure'"),
        (", higher: distilled}", "}", r"orders\[0\]: has no higher"),
        (
            "h_s: .5}",
            "h_s: [.5]}",
            r"rows.attentive.published.h_s: expected a mean, or \[mean, deviation\], got \[0.5\]",
        ),
        ("title: small", "", "a table has title, figures and rows"),
        ("details: true", "gathered: {by: h_s}", "gathered: expected by, figure, rows, published, got by"),
        (
            "details: true",
            "gathered: {by: h_s, figure: error, rows: [attentive], published: {1: [.1, .2]}}",
            r"gathered.published: expected value: \[mean, deviation, runs\]",
        ),
    ],
)
def test_other_mistakes_of_a_table_name_their_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    assert old in SMALL
    path.write_text(SMALL.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_table(str(path))


def test_where_a_run_lies_is_none_of_its_settings(small: str, tmp_path: Path) -> None:
    here, there = (plan_runs(read_table(small), tmp_path / name, 1) for name in ("here", "there"))
    assert [settings_of(stage.config) for chain in here for stage in chain] == [
        settings_of(stage.config) for chain in there for stage in chain
    ]
    longer = plan_runs(read_table(small), tmp_path, 1, epochs=3)
    assert settings_of(longer[0][0].config) != settings_of(here[0][0].config)
    assert not is_finished(here[0][0])


@pytest.mark.parametrize(
    ("given", "override"),
    [({"epochs": 3}, "training.epochs=2"), ({"epochs": 3}, "training.steps=2"), ({"source": "x"}, "data.source=y")],
)
def test_what_an_option_decides_is_no_override(
    small: str, tmp_path: Path, given: dict[str, Any], override: str
) -> None:
    message = f"^{override.partition('=')[0]}: --{next(iter(given))} decides it: give one of them"
    with pytest.raises(ConfigError, match=message):
        plan_runs(read_table(small), tmp_path, 1, overrides=[override], **given)


def run_of(row: str, seed: int, error: float) -> Run:
    return Run(row, seed, {"error": error}, {})


def test_training_figures_are_of_the_last_epoch() -> None:
    events = [
        {"step": 10, "epoch": 1.0, "train/error": 0.9},
        {"step": 14, "epoch": 1.4, "train/error": 0.5},
        {"step": 20, "epoch": 2.0, "train/error": 0.1},
    ]
    assert over_last_epoch(events, "train/error") == pytest.approx((4 * 0.5 + 6 * 0.1) / 10)


def test_runs_are_gathered_by_what_came_out_of_them() -> None:
    table = read_table("vae")

    def of(row: str, seed: int, active: float, recon: float) -> Run:
        return Run(row, seed, {"active_experts": active, "recon": recon}, {})

    runs = [
        of("experts_5", 1, 3, 17.0),
        of("experts_10", 1, 3, 18.0),
        of("one", 1, 1, 20.0),
        of("supervised", 1, 3, 9.0),
    ]
    text = results.to_markdown(table, runs, "how")
    assert "| 3 | 2 | 17.500 ± 0.707 | 16.601 ± 0.149 | 8 |" in text
    assert "| 1 | 1 | 20.000 | 17.719 ± 0.145 | 8 |" in text
    assert "| 17 | 0 |  | 15.801 ± 0.404 | 2 |" in text


def test_a_claim_may_compare_two_figures() -> None:
    def of(seed: int, error: float, teacher: float) -> Run:
        return Run("student", seed, {"error": error, "teacher": teacher}, {})

    runs = [of(1, 0.1, 0.2), of(2, 0.3, 0.3), of(3, 0.2, 0.5)]
    difference, t_test, _ = paired(runs, runs, "error", "teacher")
    assert difference.startswith("0.1333")
    assert float(t_test) == pytest.approx(scipy.stats.ttest_rel([0.2, 0.3, 0.5], [0.1, 0.3, 0.2]).pvalue, rel=1e-2)


def test_pairs_are_of_the_same_seed() -> None:
    first = [run_of("a", seed, value) for seed, value in ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (9, 0.9))]
    second = [run_of("b", seed, value) for seed, value in ((4, 0.52), (3, 0.41), (2, 0.33), (1, 0.26), (7, 0.0))]
    differences = [0.16, 0.13, 0.11, 0.12]
    mean = sum(differences) / 4
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3)
    text, t_test, wilcoxon = paired(first, second, "error")
    assert text == f"{mean:.4f} ± {deviation:.4f}"
    assert float(wilcoxon) == pytest.approx(2 / 2**4)  # all four signs alike
    from scipy import stats

    assert float(t_test) == pytest.approx(2 * stats.t.sf(mean / (deviation / 2), 3), rel=1e-2)
    assert results.paired(first, [], "error") == ("", "", "")


@pytest.mark.slow
def test_a_killed_table_goes_on(small: str, tmp_path: Path, made: Path) -> None:
    command = [sys.executable, "launcher/train_vision.py", "--table", small, "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    finished = tmp_path / "small" / "runs" / "attentive" / "seed1" / "stage1" / EVALUATION_FILE
    while not finished.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1)  # the worker ends with it
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert [row["error"] for row in written(tmp_path / "small")] == [row["error"] for row in written(made)]
