"""Whatever happens to a run, it ends in a clear error or goes on correctly: never silently wrong, never hanging.

The fast part holds one case of each kind; `-m slow` runs them all. What is tested elsewhere is not repeated: killed
while a checkpoint is written (tests/distributed/test_kill_and_resume.py), a bad loss and a full disk
(tests/training/test_run.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from s2moe.data import ByteTokenizer, write_corpus
from s2moe.training.checkpoint import list_complete
from tests.distributed_harness import DistributedError, run_distributed
from tests.failures.jobs import SIGNALS, TIMEOUT_MINUTES, Fault, run

pytestmark = pytest.mark.distributed

PATIENCE = 60 * TIMEOUT_MINUTES + 50  # seconds for starting, timeout and saying so
SHAPES = {  # a name: ranks and settings
    "2 ranks": (2, {}),
    "ZeRO 3": (2, {"training.zero_stage": 3}),
    "4 ranks": (4, {"training.global_batch": 8, "training.micro_batch": 1}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_corpus(tmp_path_factory.mktemp("corpus"))


def new_corpus(folder: Path) -> str:
    text = "sparse mixture of experts collapse. of mixture sparse experts. " * 400
    write_corpus(folder / "text", "words", {"train": text, "valid": text[:700], "test": text[:300]}, ByteTokenizer())
    return str(folder / "text")


@pytest.fixture(scope="module")
def reference(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run of a shape."""
    made: dict[str, Path] = {}

    def of(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("reference")
            ranks, settings = SHAPES[shape]
            assert run_distributed(run, ranks, corpus, str(made[shape]), settings, None)[0]["finished"]
        return made[shape]

    return of


def assert_same_run(output: Path, whole: Path) -> None:
    """Every figure of training and validation, and every final weight, is equal, bit for bit."""
    assert figures(output) == figures(whole)
    ours, theirs = (load_file(path / "run" / "hf" / "model.safetensors") for path in (output, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.equal(theirs[name]), name


def figures(output: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    events = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "train/", "val/", "lr", "grad_norm", "samples", "layer_0/load", "layer_1/load")
    return [{key: value for key, value in event.items() if key.startswith(kept)} for event in events]


def failure(
    corpus: str, output: Path, fault: Fault, shape: str = "2 ranks", settings: dict[str, Any] | None = None
) -> str:
    """What all ranks said about a run that ends early; its time is bounded."""
    ranks, of_shape = SHAPES[shape]
    with pytest.raises(DistributedError) as error:
        run_distributed(run, ranks, corpus, str(output), {**of_shape, **(settings or {})}, fault, timeout=PATIENCE)
    said = str(error.value)
    assert "did not finish within" not in said  # nobody had to end it from outside
    return said


def assert_goes_on(corpus: str, output: Path, whole: Path, shape: str = "2 ranks", checkpoint: int = 2) -> None:
    """Started again, the run continues from that checkpoint, to the bit as if nothing had happened."""
    ranks, settings = SHAPES[shape]
    assert [found.state.step for found in list_complete(output / "run" / "checkpoints")][-1:] == [checkpoint]
    again = run_distributed(run, ranks, corpus, str(output), {**settings, "checkpoint.resume": "must"}, None)
    assert again[0]["finished"]
    assert_same_run(output, whole)


# --- a process dies, stops or waits ------------------------------------------------------------------


slow = pytest.mark.slow
DEATHS = [
    pytest.param(name, rank, shape, marks=() if (name, rank, shape) == ("SIGKILL", 1, "2 ranks") else slow)
    for name in ("SIGKILL", "SIGTERM", "SIGSEGV")
    for shape in SHAPES
    for rank in (0, 1)
    if name == "SIGKILL" or (shape, rank) == ("2 ranks", 1)
]


@pytest.mark.parametrize(("name", "rank", "shape"), DEATHS)
def test_a_process_that_dies_is_named_by_the_others(
    corpus: str, reference: Any, tmp_path: Path, name: str, rank: int, shape: str
) -> None:
    said = failure(corpus, tmp_path, Fault(SIGNALS[name], rank), shape)
    assert f"rank {rank}: ended with exit code {-int(SIGNALS[name].removeprefix('signal_'))}" in said
    assert re.search(rf"LostProcessError: lost contact .* after step 3: rank {rank} gives no sign of life \(on ", said)
    assert "the same command continues from there" in said
    assert_goes_on(corpus, tmp_path, reference(shape), shape)


STANDSTILLS = [  # each waits for the watchdog
    pytest.param(kind, rank, shape, marks=slow)
    for kind in (SIGNALS["SIGSTOP"], "sleep", "all_to_all")
    for shape in SHAPES
    for rank in ((0, 1) if kind == SIGNALS["SIGSTOP"] else (1,))
]


@pytest.mark.parametrize(("kind", "rank", "shape"), STANDSTILLS)
def test_nobody_waits_longer_than_the_timeout(
    corpus: str, reference: Any, tmp_path: Path, kind: str, rank: int, shape: str
) -> None:
    said = failure(corpus, tmp_path, Fault(kind, rank), shape)
    assert said.count("error: no progress for 0.2 minutes (training.timeout_minutes) in training after step 3: ") >= 1
    assert "ended with exit code 4" in said
    place = {
        "sleep": f"rank {rank} is behind the others (on ",
        "all_to_all": "(in training after step 3): a collective does not end",
    }.get(kind, f"rank {rank} gives no sign of life (on ")
    assert place in said
    assert "waits here:" in said
    assert_goes_on(corpus, tmp_path, reference(shape), shape)


# --- the processes do not agree ----------------------------------------------------------------------


DIVERGENCES = [
    pytest.param("bias", "2 ranks", "model.layers.0.moe.router.bias_E is not the same on rank 0, 1"),
    pytest.param("weight", "2 ranks", "model.layers.1.attention.q_proj.weight is not the same on rank 0", marks=slow),
    pytest.param("position", "2 ranks", "samples is not the same on rank 0, 1", marks=slow),
    pytest.param("bias", "ZeRO 3", "model.layers.0.moe.router.bias_E is not the same on rank 0, 1", marks=slow),
    pytest.param("weight", "4 ranks", "q_proj.weight of rank 1 is not that of the other 3 ranks", marks=slow),
    pytest.param("expert", "4 ranks", "model.layers.1.moe.experts.w1 is not the same on rank 1, 3", marks=slow),
]


@pytest.mark.parametrize(("kind", "shape", "message"), DIVERGENCES)
def test_diverged_processes_write_no_checkpoint(
    corpus: str, reference: Any, tmp_path: Path, kind: str, shape: str, message: str
) -> None:
    said = failure(corpus, tmp_path, Fault(kind), shape)
    assert said.count("TrainingError: processes have diverged at step 4: ") == SHAPES[shape][0]
    assert message in said
    assert_goes_on(corpus, tmp_path, reference(shape), shape)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("settings", "was started otherwise than rank 0: optimizer.lr is 0.02, on rank 0 0.01. Start all"),
        ("data", "text-absent is not a prepared corpus; prepare it with: "),
    ],
)
def test_one_process_with_other_settings_or_data_stops_all_before_the_first_step(
    corpus: str, tmp_path: Path, kind: str, message: str
) -> None:
    answers = run_distributed(run, 2, corpus, str(tmp_path), {}, Fault(kind))
    assert answers[0] == answers[1]
    assert answers[0]["error"].startswith("rank 1 on ")
    assert message in answers[0]["error"]
    assert not (tmp_path / "run").exists()


# --- the data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("cut", "has changed since it was opened"),
        ("remove", "is gone (No such file or directory): put it back"),
        ("rewrite", "has changed since it was opened"),
    ],
)
def test_data_that_changes_while_it_is_read_stops_the_run(tmp_path: Path, kind: str, problem: str) -> None:
    corpus = new_corpus(tmp_path)
    for answer in run_distributed(run, 2, corpus, str(tmp_path), {}, Fault(kind)):
        assert re.match(
            rf"training stopped after step 3: the data file .*train\.bin {re.escape(problem)}", answer["error"]
        )
    if kind != "rewrite":
        found = "is missing" if kind == "remove" else "has 100 bytes instead of"
        answers = run_distributed(run, 2, corpus, str(tmp_path), {}, None)
        assert f"text is damaged: train.bin {found}" in answers[0]["error"]


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_quoted_by_the_others(corpus: str, tmp_path: Path, rank: int) -> None:
    said = failure(corpus, tmp_path, Fault("unreadable", rank))
    assert f"rank {rank} on " in said
    assert "left with ProcessError: training stopped after step 3: the data file" in said
    assert "train.bin is gone (Stale file handle): put it back as it was" in said


# --- checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A run with checkpoints of steps 2 and 4 that was killed in step 5, by ZeRO stage."""
    made: dict[int, Path] = {}

    def of(stage: int) -> Path:
        if stage not in made:
            made[stage], settings = tmp_path_factory.mktemp("killed"), {"training.zero_stage": stage}
            with pytest.raises(DistributedError, match="exit code -9"):
                run_distributed(run, 2, corpus, str(made[stage]), settings, Fault(SIGNALS["SIGKILL"], 0, 5))
        return made[stage]

    return of


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"removed": Path.unlink, "cut": cut, "flipped": flip}


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("stage", "damage", "every"),
    [
        pytest.param(1, "cut", 6, id="cut, a few"),
        *(
            pytest.param(stage, damage, 1, marks=slow, id=f"{damage}, ZeRO {stage}")
            for damage in DAMAGES
            for stage in (1, 3)
        ),
    ],
)
def test_each_file_of_the_newest_checkpoint_damaged(
    corpus: str, reference: Any, two_checkpoints: Any, tmp_path: Path, stage: int, damage: str, every: int
) -> None:
    """The one before is used, and the run is what it would have been."""
    source = two_checkpoints(stage)
    names = files_of(source / "run" / "checkpoints" / "step-00000004")
    assert len(names) >= 5
    for number, name in enumerate(names[::every]):
        output = tmp_path / str(number)
        shutil.copytree(source, output)
        DAMAGES[damage](output / "run" / "checkpoints" / "step-00000004" / name)
        settings = {"training.zero_stage": stage, "checkpoint.resume": "must"}
        assert run_distributed(run, 2, corpus, str(output), settings, None)[0]["finished"], name
        assert_same_run(output, reference("ZeRO 3" if stage == 3 else "2 ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(4,), (2, 4)], ids=["newest", "all"])
def test_checkpoints_that_are_gone(
    corpus: str, reference: Any, two_checkpoints: Any, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    output = tmp_path / "output"
    shutil.copytree(two_checkpoints(1), output)
    for step in steps:
        shutil.rmtree(output / "run" / "checkpoints" / f"step-{step:08}")
    settings = {"checkpoint.resume": "must"}
    answer = run_distributed(run, 2, corpus, str(output), settings, None)[0]
    if steps == (4,):
        assert answer["finished"]
    else:
        assert "checkpoint.resume=must, but there is no complete checkpoint in" in answer["error"]
        assert run_distributed(run, 2, corpus, str(output), {}, None)[0]["finished"]
    assert_same_run(output, reference("2 ranks"))


def test_the_log_has_no_gap_and_no_double(corpus: str, reference: Any) -> None:
    lines = (reference("2 ranks") / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
