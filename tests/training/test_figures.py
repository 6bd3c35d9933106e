"""The figures that people see: load, heat-map, progress lines, costs before a run."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.metrics.load import load_figures
from s2moe.moe.routing import LayerStatistics
from s2moe.training.console import Console, format_seconds
from s2moe.training.hardware import peak_flops, peak_flops_of
from s2moe.training.plan import memory_per_process, plan
from s2moe.training.routing_totals import LayerTotals, RoutingTotals
from s2moe.training.run_log import layer_figures
from s2moe.training.tensorboard import CELL, heat_map

REPOSITORY = Path(__file__).resolve().parents[2]


def report(layer: int, counts: list[int], **values: float) -> LayerStatistics:
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    return LayerStatistics(layer, torch.tensor(0.0), torch.tensor(counts), tensors)


def test_totals_add_counts_and_average_figures() -> None:
    totals = RoutingTotals()
    totals.add((report(1, [1, 3], margin=1.0, gate=0.5), report(3, [2, 2, 0], margin=4.0)))
    totals.add((report(1, [2, 2], margin=2.0, gate=0.5), report(3, [2, 2, 0], margin=0.0)))
    assert totals.reduce() == [
        LayerTotals(1, (3.0, 5.0), {"margin": 1.5, "gate": 0.5}),
        LayerTotals(3, (4.0, 4.0, 0.0), {"margin": 2.0}),
    ]
    assert totals.reduce() == []


def test_load_figures() -> None:
    even = load_figures([5.0] * 4)
    ones = dict.fromkeys(("load_entropy", "load_perplexity", "min_load", "max_load"), 1.0)
    assert even == pytest.approx(ones | dict.fromkeys(("max_violation", "load_cv", "dead_experts"), 0.0))
    skewed = load_figures([6.0, 2.0, 0.0, 0.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert skewed == pytest.approx(
        {
            "load_entropy": entropy,
            "load_perplexity": 4**entropy / 4,
            "max_violation": 2.0,
            "max_load": 3.0,
            "load_cv": math.sqrt((4 + 0 + 1 + 1) / 4),
            "min_load": 0.0,
            "dead_experts": 0.5,
        }
    )


def test_layer_figures_are_named_by_layer() -> None:
    figures = layer_figures([LayerTotals(2, (1.0, 1.0), {"margin": 0.5})])
    assert figures["layer_2/margin"] == 0.5
    assert figures["layer_2/load_entropy"] == pytest.approx(1.0)


def test_heat_map_has_a_cell_per_expert() -> None:
    picture = heat_map([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]])
    assert picture.shape == (2 * CELL, 3 * CELL, 3)
    cells = picture[::CELL, ::CELL]
    assert cells[0].tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37]]
    assert cells[1, 0].tolist() == [253, 231, 37]


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    console = Console(steps=10, stream=stream, symbol="byte")
    console.step()
    console.event(5, {"train/loss": 1.5, "train/bpc": 2.0, "tokens_per_second": 12345.6, "mfu": None, "lr": 1e-3})
    console.close()
    line = stream.getvalue()
    assert line.startswith("step 5/10  loss 1.5000  bits/byte 2.0000  12,346 tok/s  lr 1.00e-03  ")
    assert line.endswith(" left\n")


def test_bar_in_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(steps=10, step=4, stream=stream)
    console.step()
    console.event(5, {"train/loss": 1.5})
    console.close()
    assert "5/10" in stream.getvalue()
    assert "loss 1.5000" in stream.getvalue()


def test_seconds() -> None:
    assert [format_seconds(s) for s in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]


def test_peaks() -> None:
    assert peak_flops_of("NVIDIA H200", "bf16") == 989e12
    assert peak_flops_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops_of("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops_of("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops_of("NVIDIA A40", "fp32") == 37.4e12
    assert peak_flops_of("NVIDIA RTX A4000", "fp32") is None
    assert peak_flops_of("Some GPU", "bf16") is None
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_memory_is_dealt_out_as_zero_and_expert_parallelism_do() -> None:
    """8 processes, experts over 4 of them: each expert is held by 2. A gradient is kept in float32, 4 bytes.

    At stage 1 the last one lives in bf16 beside it.
    """
    for stage, weights, gradients in ((1, 2 * 800, 6 * 800), (2, 2 * 800, 4 * 100), (3, 2 * 100, 4 * 100)):
        dense, _ = memory_per_process(800, 3200, 8, 4, stage, "bf16")
        assert (dense.weights, dense.gradients, dense.optimizer) == (weights, gradients, 12 * 100)
    for stage, weights, gradients in ((1, 2 * 800, 6 * 800), (2, 2 * 800, 4 * 400), (3, 2 * 400, 4 * 400)):
        _, experts = memory_per_process(800, 3200, 8, 4, stage, "bf16")
        assert (experts.weights, experts.gradients, experts.optimizer) == (weights, gradients, 12 * 400)


def test_plan_of_ten_billion_allocates_nothing() -> None:
    config = load(RunConfig, REPOSITORY / "configs" / "large_10b.yaml")
    text = plan(config, config.model_config(32000), world_size=64)
    assert "8 expert-parallel x 8 copies of the experts, ZeRO stage 2, bf16" in text
    total = int(next(line for line in text.splitlines() if line.startswith("  total ")).split()[1].replace(",", ""))
    assert total > 10e9
    assert "4,194,304 tokens" in text
