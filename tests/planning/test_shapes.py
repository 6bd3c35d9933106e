"""Which shapes are tried, how they are ranked, and what launcher/plan.py prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import pretrain
from launcher.plan import main
from s2moe.config import ConfigError, load
from s2moe.config.run import RunConfig, check_world
from s2moe.planning.calibration import Efficiency
from s2moe.planning.machines import GIB, machine
from s2moe.planning.memory import USABLE
from s2moe.planning.report import write_best
from s2moe.planning.shapes import Cluster, Shape, rank_shapes, refusals
from s2moe.training.engine import deepspeed_config

LARGE = Path(__file__).resolve().parents[2] / "configs" / "large_10b.yaml"


def ranked(*overrides: str, memory_gib: float | None = None, machines: int = 2) -> tuple[list[Shape], Cluster]:
    config = load(RunConfig, LARGE, ["model.num_hidden_layers=6", "training.global_batch=64", *overrides])
    cluster = Cluster(machine("h100", memory_gib), machines, 8, Efficiency(0.5, 0.4, "given"), 0.3)
    return rank_shapes(config, config.model_config(32000), cluster), cluster


def test_fitting_ones_first_by_speed() -> None:
    shapes, cluster = ranked(memory_gib=40)
    kinds = [(shape.fits, bool(shape.refusal)) for shape in shapes]
    assert kinds == sorted(kinds, key=[(True, False), (False, False), (False, True)].index)
    fitting = [shape for shape in shapes if shape.fits]
    assert 0 < len(fitting) < len(shapes)
    speeds = [shape.tokens_per_second for shape in fitting]
    assert speeds == sorted(speeds, reverse=True)
    for shape in shapes:
        if shape.memory is not None:
            assert shape.fits == (shape.memory.total <= USABLE * 40 * GIB)
    assert cluster.world_size == 16


def test_impossible_ones_are_refused_by_the_rules_of_a_run() -> None:
    shapes, cluster = ranked("training.global_batch=48")
    refused = [shape for shape in shapes if shape.refusal]
    assert refused
    for shape in shapes:
        settings = ["model.num_hidden_layers=6", "training.global_batch=48", *shape.overrides()]
        assert shape.refusal == refusal(settings, cluster.world_size)


def refusal(settings: list[str], world_size: int) -> str:
    """What a run with these settings would be told before it begins."""
    try:
        check_world(load(RunConfig, LARGE, settings), world_size)
    except ConfigError as error:
        return str(error)
    return ""


def test_more_sharding_and_recomputation_need_less_memory() -> None:
    shapes, _ = ranked()
    by_shape = {(s.zero_stage, s.expert_parallel, s.micro_batch, s.checkpointing): s for s in shapes}

    def total(*shape: int | bool) -> float:
        found = by_shape[shape].memory  # type: ignore[index]
        assert found is not None
        return found.weights + found.gradients + found.optimizer

    assert total(3, 1, 1, False) < total(2, 1, 1, False) < total(1, 1, 1, False)
    assert total(1, 8, 1, False) < total(1, 2, 1, False)
    kept, recomputed = (by_shape[2, 8, 4, checkpointing] for checkpointing in (False, True))
    assert kept.memory is not None
    assert recomputed.memory is not None
    assert recomputed.memory.total < kept.memory.total
    assert recomputed.tokens_per_second < kept.tokens_per_second


def test_offloading_moves_the_optimizer_and_costs_time() -> None:
    (held, *_), _ = ranked()
    (moved, *_), _ = ranked("training.offload_optimizer=true")
    assert held.memory is not None
    assert moved.memory is not None
    assert held.memory.optimizer > 0 == moved.memory.optimizer
    assert moved.tokens_per_second < held.tokens_per_second


def test_the_best_is_written_for_deepspeed(tmp_path: Path) -> None:
    shapes, cluster = ranked()
    files = write_best(shapes, cluster, tmp_path / "shape")
    assert [file.name for file in files] == ["deepspeed.json", "overrides.txt"]
    settings = files[1].read_text().split()
    config = load(RunConfig, LARGE, ["model.num_hidden_layers=6", "training.global_batch=64", *settings])
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(deepspeed_config(config, 16)))
    assert config.training.expert_parallel == shapes[0].expert_parallel
    tiny, cluster = ranked(memory_gib=4)
    with pytest.raises(ConfigError, match="no shape fits"):
        write_best(tiny, cluster, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_best(shapes, ranked()[1], tmp_path / "file" / "shape")


def test_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--config", str(LARGE), "--nodes", "2", "model.num_hidden_layers=6", "training.global_batch=64"]
    main(
        [*small, "--gpu", "h200", "--json", str(tmp_path / "all.json"), "--write", str(tmp_path / "best"), "--top", "3"]
    )
    printed = capsys.readouterr().out
    for part in (
        "16 processes: 2 machines x 8 h200, 140 GiB each",
        "tokens/s",
        "GiB a process:",
        "busiest rank's",
        "wrote",
    ):
        assert part in printed
    shown = [line.split() for line in printed.splitlines() if line.strip().endswith(("yes", "no")) or " yes " in line]
    found = json.loads((tmp_path / "all.json").read_text())
    best = found["shapes"][0]
    assert best["fits"]
    assert sum(len(line) == 8 for line in shown) <= 3
    kinds = {"weights", "gradients", "optimizer", "buffers", "activations", "logits", "dispatch", "total"}
    assert kinds <= set(best["memory"])
    assert {"all_to_all", "dense_reduce", "expert_reduce", "dense_gather", "expert_gather"} <= set(best["bytes_sent"])
    assert (tmp_path / "best" / "overrides.txt").read_text().split() == best["overrides"]
    main([*small, "--gpu-memory", "3"])
    assert "none fits; the smallest in detail" in capsys.readouterr().out


def dispatch_of(target: Path, *imbalance: str) -> dict[str, float]:
    """Bytes of dispatch of each shape with expert parallelism 8, as the command writes them."""
    small = ["--config", str(LARGE), "model.num_hidden_layers=6", "training.global_batch=64"]
    main([*small, *imbalance, "--json", str(target)])
    shapes = json.loads(target.read_text())["shapes"]
    return {str(s["overrides"]): s["memory"]["dispatch"] for s in shapes if s["expert_parallel"] == 8}


def test_the_busiest_rank_follows_from_the_spread_of_the_loads(tmp_path: Path) -> None:
    even, uneven = (dispatch_of(tmp_path / "all.json", "--load-cv", value) for value in ("0", "2"))
    assert even
    assert all(uneven[shape] > size for shape, size in even.items())


def test_planned_imbalance_is_what_dispatch_must_hold(tmp_path: Path) -> None:
    dispatch = [dispatch_of(tmp_path / "all.json", "--imbalance", value) for value in ("1", "2")]
    assert dispatch[0].keys() == dispatch[1].keys()
    # Twice as many rows received and computed, as many sent and returned.
    assert all(dispatch[1][shape] == pytest.approx(1.5 * size) for shape, size in dispatch[0].items())


def test_no_shape_for_so_many_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        main(["--config", str(LARGE), "--nodes", "3", "--gpus-per-node", "7"])
    told = str(raised.value)
    assert told.startswith("no shape is possible on 21 processes: ")
    assert told.count("must be a multiple of processes x micro_batch") == 1
    assert told.endswith("The nearest number of processes that works is 16")
    assert "shapes:" not in capsys.readouterr().out


def test_reasons_are_told_once_each() -> None:
    shapes, _ = ranked("training.global_batch=48")
    reasons = refusals(shapes)
    assert len(reasons) == len({reason.split(",")[0].split(" = ")[0] for reason in reasons}) >= 1
    assert {reason.partition(":")[0] for reason in reasons} == {
        s.refusal.partition(":")[0] for s in shapes if s.refusal
    }


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--network-gbit", "0", "must be above 0, got 0"),
        ("--network-gbit", "nan", "must be above 0, got nan"),
        ("--gpu-memory", "0", "must be above 0, got 0"),
        ("--imbalance", "0.5", "must be at least 1, got 0.5"),
        ("--load-cv", "-1", "must not be negative, got -1"),
        ("--nodes", "0", "must be at least 1, got 0"),
    ],
)
def test_numbers_that_cannot_be(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--config", str(LARGE), f"{option}={value}"])
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: argument {option}: {message}")


@pytest.mark.parametrize("number", ["0", "-2"])
def test_a_dry_run_is_of_one_process_at_least(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        pretrain.main(["--config", str(LARGE), "--dry-run", "--world-size", number])
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"error: --world-size must be at least 1, got {number} (--help explains)\n"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    small = ["--config", str(LARGE), "model.num_hidden_layers=6", "training.global_batch=64"]
    with pytest.raises(ConfigError, match=r"--json: cannot write .*: No such file or directory"):
        main([*small, "--json", str(tmp_path / "nowhere" / "x.json")])


@pytest.mark.slow
def test_started_as_a_file_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(LARGE.parents[1] / "launcher" / "plan.py"), "--config", str(LARGE), "--gpu", "h20O"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: --gpu: unknown 'h20O', did you mean 'h200'?")
