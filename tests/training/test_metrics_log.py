"""metrics.jsonl stays true when a run is interrupted and continued."""

from __future__ import annotations

import json
from pathlib import Path

from s2moe.training.metrics_log import MetricsLog, read


def steps(path: Path) -> list[int]:
    return [event["step"] for event in read(path)]


def log(path: Path, first: int, last: int, resumed: int = 0) -> None:
    metrics = MetricsLog(path, resumed)
    for step in range(first, last + 1):
        metrics.write(step, {"train/loss": float(step)})
    metrics.close()


def test_resuming_drops_the_steps_that_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 1, 7)
    log(path, 6, 8, resumed=5)
    assert steps(path) == list(range(1, 9))


def test_starting_over_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 1, 3)
    log(path, 1, 2)
    assert steps(path) == [1, 2]


def test_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 1, 3)
    path.write_bytes(path.read_bytes()[:-9])
    log(path, 3, 4, resumed=2)
    assert steps(path) == [1, 2, 3, 4]


def test_last_line_without_its_newline_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 1, 3)
    path.write_bytes(path.read_bytes()[:-1])
    log(path, 4, 4, resumed=3)
    assert steps(path) == [1, 2, 3, 4]


def test_untouched_when_nothing_is_to_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 1, 3)
    before = path.stat().st_ino, path.read_bytes()
    MetricsLog(path, 3).close()
    assert (path.stat().st_ino, path.read_bytes()) == before


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path)
    metrics.write(1, {"a": float("nan"), "b": float("inf"), "c": 1, "d": None})
    metrics.close()
    assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": None, "c": 1, "d": None}
