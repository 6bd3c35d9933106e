"""benchmarks/moe_layer.py: the whole script at tiny shapes, and the parts its figures depend on.

Legend: T tokens, D model.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.agreement import Reference, run
from benchmarks.comparison import Disagreement, Row, build, compare, summarise
from benchmarks.implementation import Implementation, Unavailable
from benchmarks.inputs import draw_tokens, draw_weights
from benchmarks.shapes import FULL, QUICK, Shape
from benchmarks.timing import Timing, take_turns

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "moe_layer.py"
CPU = torch.device("cpu")
FLOAT = torch.float32
SHAPES = (Shape(64, 16, 24, 4, 2), Shape(64, 16, 24, 4, 1), Shape(64, 16, 8, 16, 8))
TIMED_ANYWHERE = {
    "dense", "smoe", "s2moe", "transformers_eager", "transformers_grouped_mm", "transformers_batched_mm",
    "deepspeed_moe", "deepspeed_autoep",
}  # fmt: skip


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # A process of its own: the script makes a process group and sets the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_the_script_times_every_implementation_and_writes_json(tmp_path: Path) -> None:
    shapes = [argument for shape in SHAPES for argument in ("--shape", ",".join(map(str, shape)))]
    options = ["--device", "cpu", "--threads", "1", "--repeats", "2", "--json", "out.json"]
    done = start(*shapes, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "T 64  D 16  F 24  E 4  k 2" in done.stdout
    assert "smoe/best peer" in done.stdout

    content = json.loads((tmp_path / "out.json").read_text())
    header = content["header"]
    assert set(header) >= {"date", "device", "cores", "threads", "dtype", "load_average", "torch", "deepspeed"}
    assert (header["threads"], header["dtype"], header["torch"]) == (1, "float32", version("torch"))
    for shape in SHAPES:
        rows = {row["implementation"]: row for row in content["rows"] if row["shape"] == list(shape)}
        timed = {name for name, row in rows.items() if row["ms"] is not None}
        missing = {name: row["note"] for name, row in rows.items() if name in TIMED_ANYWHERE - timed}
        assert timed >= TIMED_ANYWHERE, missing
        assert ("smoe_top2" in rows) == (shape.experts_per_token != 2)
        for name, row in rows.items():
            if name in timed:
                assert 0 < row["fastest_ms"] <= row["ms"]
                assert row["spread_ms"] >= 0
                assert row["repeats"] == 2
                assert math.isclose(row["ratio_to_dense"], row["ms"] / rows["dense"]["ms"])
            else:
                assert row["ratio_to_dense"] is None
                assert row["note"], f"{name} is left out without a reason"
    assert [tuple(summary["shape"]) for summary in content["summary"]] == list(SHAPES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "1,2,3"], "five integers"),
        (["--shape", "64,16,8,4,5"], "K within E"),
        (["--json", "nowhere/out.json"], "does not exist"),
        (["--only", "somoe"], "unknown somoe"),
    ],
)
def test_impossible_arguments_are_refused_by_name(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.moe_layer import main

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the script sets it, for this test alone
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--device", "cpu"])
    assert said in capsys.readouterr().err + str(error.value)


def test_without_deepspeed_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    names = ["smoe", "deepspeed_moe", "deepspeed_autoep"]
    dense, smoe, native, autoep = compare(SHAPES[0], names, CPU, FLOAT, repeats=1, slow_seconds=60)
    assert dense.implementation == "dense"
    assert smoe.ms is not None
    for row in (native, autoep):
        assert (row.ms, row.note) == (None, "deepspeed is not installed")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_check_accepts_our_layer_and_refuses_another_one(shape: Shape) -> None:
    weights, (hidden_1TD, gradient_1TD) = draw_weights(shape, CPU), draw_tokens(shape, CPU, FLOAT)
    reference = Reference(shape, weights, hidden_1TD, gradient_1TD, FLOAT)
    layer = build("smoe", shape, weights, CPU, FLOAT)
    off = reference.disagreement(layer.reference, run(layer, hidden_1TD, gradient_1TD))
    assert reference.agrees(off)
    assert all(parameter.grad is None for parameter in layer.module.parameters())

    with torch.no_grad():
        layer.module.experts.w2[0] *= 1.01  # type: ignore[union-attr, index, operator]
    off = reference.disagreement(layer.reference, run(layer, hidden_1TD, gradient_1TD))
    assert not reference.agrees(off)


def test_a_wrong_gradient_or_nan_disagrees() -> None:
    shape = SHAPES[0]
    weights, (hidden_1TD, gradient_1TD) = draw_weights(shape, CPU), draw_tokens(shape, CPU, FLOAT)
    reference = Reference(shape, weights, hidden_1TD, gradient_1TD, FLOAT)
    right = reference.outcomes["renormalised"]
    assert reference.disagreement("renormalised", right) == 0
    wrong = right._replace(input_gradient_1TD=1.01 * right.input_gradient_1TD)
    assert reference.disagreement("renormalised", wrong) == 1
    assert reference.disagreement("renormalised", right._replace(out_1TD=right.out_1TD * math.nan)) == 1


def test_nothing_is_timed_when_our_layer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "disagreement", lambda *_: 0.5)
    with pytest.raises(Disagreement, match=r"smoe at T 64 .* 50\.0% of the tokens"):
        compare(SHAPES[0], ["smoe"], CPU, FLOAT, repeats=1, slow_seconds=60)


def test_what_does_not_fit_into_memory_is_left_out() -> None:
    shape = Shape(2**24, 256, 512, 2, 2)
    weights = draw_weights(shape, CPU)
    with pytest.raises(Unavailable, match="GiB"):
        build("transformers_batched_mm", shape, weights, CPU, FLOAT)


def test_implementations_take_turns_and_slow_ones_run_once() -> None:
    order: list[str] = []

    def implementation(name: str) -> Implementation:
        module = nn.Linear(2, 2)

        def forward(hidden_1TD: Tensor) -> tuple[Tensor, Tensor]:
            order.append(name)
            return module(hidden_1TD), module.weight.sum()

        return Implementation(name, module, forward)

    hidden_1TD = torch.randn(1, 3, 2)
    timings = take_turns(
        {name: implementation(name) for name in "abc"}, hidden_1TD, torch.ones(1, 3, 2), repeats=3, slow={"b"}
    )
    assert "".join(order) == "abc" + "ac" + "ca"
    assert {name: timing.repeats for name, timing in timings.items()} == {"a": 3, "b": 1, "c": 3}


def test_timing_is_median_interquartile_range_and_minimum() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 100.0, 4.0]) == Timing(4.0, 3.0, 1.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 0.0, 7.0, 1)


def test_summary_compares_with_the_fastest_peer_and_our_top_2() -> None:
    def rows(choices: int, **ms: float | None) -> list[Row]:
        shape = Shape(64, 16, 24, 4, choices)
        return [Row(shape, name, value) for name, value in ms.items()]

    figures = summarise(rows(2, dense=10.0, smoe=12.0, s2moe=15.0, deepspeed_moe=16.0, deepspeed_autoep=None))
    assert figures.best_peer == "deepspeed_moe"
    assert figures.smoe_to_dense == pytest.approx(1.2)
    assert figures.smoe_to_best_peer == pytest.approx(0.75)
    assert figures.s2moe_to_top2 == pytest.approx(1.25)
    other = summarise(rows(1, dense=10.0, smoe=12.0, smoe_top2=20.0, s2moe=15.0))
    assert (other.s2moe_to_top2, other.best_peer, other.smoe_to_best_peer) == (0.75, None, None)


def test_the_shapes_cover_what_they_promise() -> None:
    assert FULL[: len(QUICK)] == QUICK
    assert len(set(FULL)) == len(FULL)
    assert {shape.num_experts for shape in FULL} == {8, 16, 64}
    assert {shape.experts_per_token for shape in FULL} == {1, 2, 8}
    assert {shape.tokens for shape in FULL} == {4096, 8192, 16384, 32768}
