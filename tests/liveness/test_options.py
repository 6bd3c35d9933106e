"""Options that no other test gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import common, pretrain, supervise
from s2moe.config import ConfigError, load
from s2moe.config.run import RunConfig
from s2moe.data import Corpus
from s2moe.moe.methods import METHODS
from s2moe.planning.calibration import calibrate
from s2moe.planning.machines import machine
from s2moe.training.plan import plan
from s2moe.training.standalone import find_device, without_newlines
from tests.training.jobs import tiny_corpus


def test_list_methods_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main(["--list-methods"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(METHODS)


def test_min_processes_cannot_exceed_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "gpus", list)
    with pytest.raises(ConfigError, match="--min-processes: must be at most the 2 processes, got 3"):
        supervise.main(["--processes", "2", "--min-processes", "3", "--config", "configs/quickstart.yaml"])


def test_measured_links_replace_the_stated_ones(tmp_path: Path) -> None:
    links = {"of all processes": {"bandwidth": 1e9, "latency": 1e-3}}
    (tmp_path / "doctor.json").write_text(json.dumps({"measured": {"all_to_all": links}}), encoding="utf-8")
    stated, _ = calibrate(machine("h100"), "bf16")
    measured, _ = calibrate(machine("h100"), "bf16", tmp_path / "doctor.json")
    assert measured.link < stated.link
    assert measured.link_latency == 1e-3


def test_newlines_are_dropped(tmp_path: Path) -> None:
    corpus = Corpus.open(tiny_corpus(tmp_path / "corpus"))
    stream = corpus.split("train")
    stream.tokens = stream.tokens.copy()
    stream.tokens[5] = ord("\n")
    assert len(without_newlines(corpus, stream)) == len(stream) - 1


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:x"])
def test_a_device_is_a_cpu_or_a_gpu(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device:? .*{name}.*: give cpu or cuda"):
        find_device(name)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 TiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
    ids=["numpy", "cpu", "gpu"],
)
def test_no_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(common, "leave", leave)
    with pytest.raises(SystemExit) as ended, common.user_errors():
        raise error
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("\n")) == (2, 1)
    assert told.startswith("error: out of memory: ")


def test_dry_run_says_where_the_optimizer_is() -> None:
    small = ["name=x", "data.dir=x", "training.steps=1", "training.global_batch=1", "training.sequence_length=8"]
    here, moved = (
        plan(config, config.model_config(256), 1)
        for config in (load(RunConfig, None, [*small, *more]) for more in ([], ["training.offload_optimizer=true"]))
    )
    assert "optimizer state" in here
    assert "in the host's memory" in moved
