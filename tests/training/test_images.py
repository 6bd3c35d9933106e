"""When pictures are drawn: at the first log event after each multiple of `images_every`."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from s2moe.config import load
from s2moe.config.run import RunConfig
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
