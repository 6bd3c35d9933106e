"""When pictures are drawn: at the first log event after each multiple of `images_every`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.training import metrics_log
from s2moe.training.routing_totals import LayerTotals
from s2moe.training.run_log import RunLog

from .jobs import tiny_run


def test_pictures_histograms_and_scalars(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    log = RunLog(load(RunConfig, path, [*overrides, "logging.images_every=10"]), tmp_path, step=0, is_main=True)
    layers = [LayerTotals(1, (1.0, 3.0), {"gate_mean": 0.5})]
    for step in (4, 8, 12, 16, 20, 24):
        log.training(step, {"train/loss": 1.0 / step, "mfu": None}, layers)
    log.validation(24, {"val/bpc": 2.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0, "images": 0})
    events.Reload()
    assert [image.step for image in events.Images("load/heat_map")] == [12, 20]
    assert [histogram.step for histogram in events.Histograms("load/layer_1")] == [12, 20]
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [4, 8, 12, 16, 20, 24]
    assert [scalar.value for scalar in events.Scalars("val/bpc")] == [2.0]
    assert events.Scalars("layer_1/gate_mean")[0].value == 0.5


def test_the_closing_validation_has_tags_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the whole split after those of its first 200 bytes; where all are of the whole, they are one curve."""
    path, overrides = tiny_run(tmp_path)
    validations = ((3, {"val/bpc": 4.0, "val/symbols": 200}), (6, {"val/bpc": 2.0, "val/symbols": 600}))
    for most, tags in (("200", {"val/bpc": [4.0], "val_whole/bpc": [2.0]}), ("null", {"val/bpc": [4.0, 2.0]})):
        directory = tmp_path / most
        directory.mkdir()
        config = load(RunConfig, path, [*overrides, f"evaluation.max_symbols={most}"])
        log = RunLog(config, directory, step=0, is_main=True, symbol="byte")
        for step, values in validations:
            log.validation(step, values)
        log.close()
        assert [event["val/bpc"] for event in metrics_log.read(directory / "metrics.jsonl")] == [4.0, 2.0]
        events = EventAccumulator(str(directory / "tensorboard"))
        events.Reload()
        assert {tag for tag in events.Tags()["scalars"] if tag.endswith("bpc")} == set(tags)
        assert {tag: [scalar.value for scalar in events.Scalars(tag)] for tag in tags} == tags
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "step 3: val bits/byte 4.0000",
            "step 6: val bits/byte 2.0000" + ", of the whole split" * (most == "200"),
        ]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    directory = tmp_path / "rank1"
    directory.mkdir()
    log = RunLog(load(RunConfig, path, overrides), directory, step=0, is_main=False)
    log.training(1, {"train/loss": 1.0}, [])
    log.say("nothing")
    log.step()
    log.close()
    assert list(directory.iterdir()) == []
