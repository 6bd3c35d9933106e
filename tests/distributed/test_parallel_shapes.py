"""The matrix of parallel shapes: every run equals that of one process, in losses, gradient norms and final weights.

Whole runs through `pretrain`: data x expert parallelism x ZeRO stages, optimizer offload, gradient accumulation,
recomputed activations, precisions, and methods of fixed and ragged routing.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from s2moe.config.run import RunConfig
from s2moe.data import ByteTokenizer, write_corpus
from s2moe.training.processes import Processes
from s2moe.training.run import pretrain
from tests.distributed_harness import reset_groups, run_distributed
from tests.settings import as_in_a_file

pytestmark = pytest.mark.distributed

STEPS = 3
RUN = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.hidden_dropout": 0.1,
    "model.moe.num_experts": 4,
    "model.moe.expert_hidden": 32,
    "model.moe.router.balance_scope": "local",  # of one micro-batch, however many run at once
    "training.steps": STEPS,
    "training.micro_batch": 2,
    "training.sequence_length": 32,
    "optimizer.lr": 0.01,
    "optimizer.eps": 1e-3,  # Adam's quotient of two gradients near zero would enlarge rounding
    "optimizer.clip": 0.5,
    "evaluation.every": 0,
    "evaluation.context": 32,
    "evaluation.segment": 32,
    "evaluation.max_symbols": 200,
    "checkpoint.every": 0,
    "logging.every": 1,
    "logging.tensorboard": False,
    "logging.sample_tokens": 0,
}
METHODS = ("smoe", "usmoe", "gshard")  # k experts a token; any number of them; two, of which the second may be none
TOLERANCES = {  # of losses, gradient norms and weights
    "fp32": (2e-5, 3e-4, 2e-5),
    "bf16": (3e-3, 3e-2, 1e-2),
}


@dataclass(frozen=True)
class Shape:
    """How a run is spread."""

    world: int = 1
    expert_parallel: int = 1
    zero_stage: int = 1
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    sequence_parallel: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        return {f"training.{name}": value for name, value in asdict(self).items() if name != "world"}


@dataclass(frozen=True)
class Work:
    """What a run computes."""

    method: str = "smoe"
    precision: str = "fp32"
    global_batch: int = 8
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model.moe.method": self.method,
            "training.precision": self.precision,
            "training.global_batch": self.global_batch,
            **self.extra,
        }


SHAPES = [
    Shape(world, degree, stage) for world in (2, 4) for degree in (1, 2, 4) for stage in (1, 2, 3) if degree <= world
]
WORKS = [
    Work(method, precision, (8, 16)[number % 2])
    for number, (precision, method) in enumerate(itertools.product(TOLERANCES, METHODS))
]


def runs(corpus: str, output: str, settings: list[dict[str, Any]]) -> None:
    """A run of each, one after another, in directories run0, run1, ..."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for number, own in enumerate(settings):
        reset_groups()
        overrides = {"name": f"run{number}", "data.dir": corpus, "output_dir": output, **RUN, **own}
        config = as_in_a_file(RunConfig, overrides)
        assert pretrain(config, Processes(rank, rank, world, torch.device("cpu"))).finished


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("corpus") / "text"
    words = random.Random(0).choices(["sparse ", "mixture ", "of ", "experts ", "collapse. "], k=3000)
    text = "".join(words)
    write_corpus(directory, "words", {"train": text, "valid": text[:700], "test": text[:300]}, ByteTokenizer())
    return str(directory)


def figures(run: Path) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and gradient norms of each step, and the final weights."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if "train/loss" in event]
    weights = load_file(run / "hf" / "model.safetensors")
    return [event["train/loss"] for event in steps], [event["grad_norm"] for event in steps], weights


def assert_equals_one_process(corpus: str, folder: Path, work: Work, shapes: list[Shape]) -> None:
    run_distributed(runs, 1, corpus, str(folder / "one"), [work.settings | Shape().settings])
    losses, norms, weights = figures(folder / "one" / "run0")
    assert len(losses) == STEPS
    assert min(norms) > 0.5  # it is clipped
    of_loss, of_norm, of_weight = TOLERANCES[work.precision]
    for world in sorted({shape.world for shape in shapes}):
        chosen = [shape for shape in shapes if shape.world == world]
        output = folder / str(world)
        run_distributed(runs, world, corpus, str(output), [work.settings | shape.settings for shape in chosen])
        for number, shape in enumerate(chosen):
            found_losses, found_norms, found_weights = figures(output / f"run{number}")
            assert found_losses == pytest.approx(losses, rel=of_loss), (shape, work)
            assert found_norms == pytest.approx(norms, rel=of_norm), (shape, work)
            assert found_weights.keys() == weights.keys()
            for name, weight in found_weights.items():
                torch.testing.assert_close(
                    weight.float(),
                    weights[name].float(),
                    rtol=of_weight,
                    atol=of_weight,
                    msg=lambda m, n=name, s=shape: f"{s} {work} {n}: {m}",
                )


def covering(shapes: list[Shape], turn: int) -> list[Shape]:
    """Every shape, each with one of the four settings of offload and recomputation, another one at every turn."""
    ways = [(False, False), (True, False), (False, True), (True, True)]
    return [
        Shape(shape.world, shape.expert_parallel, shape.zero_stage, *ways[(number + turn) % 4])
        for number, shape in enumerate(shapes)
    ]


def test_two_ranks_equal_one_process(corpus: str, tmp_path: Path) -> None:
    shapes = [Shape(2, 2, 1, True, False), Shape(2, 2, 3, False, True), Shape(2, 1, 2, True, True)]
    assert_equals_one_process(corpus, tmp_path, Work("usmoe"), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.method}-{work.precision}-batch {work.global_batch}")
def test_every_shape_equals_one_process(corpus: str, tmp_path: Path, work: Work) -> None:
    """15 shapes for each of 6 works; over the works, each shape meets all four ways of offload and recomputation."""
    assert_equals_one_process(corpus, tmp_path, work, covering(SHAPES, WORKS.index(work)))


# A part of a sequence draws its own dropout, and counts its own load for the balance loss: here is neither.
COMPARABLE = {"model.hidden_dropout": 0.0, "model.moe.router.balance_loss": 0.0, "model.num_key_value_heads": 2}
SEQUENCE_SHAPES = [
    Shape(world, degree, stage, offload, recompute, size)
    for (world, size), (stage, offload, recompute) in itertools.product(
        ((2, 2), (4, 2), (4, 4)), ((1, True, False), (2, False, True), (3, False, False), (3, True, True))
    )
    for degree in (1, world)
]


SEQUENCE_WORKS = {  # and which of the shapes: all of them, or every third, another third for each work
    ("smoe", "fp32"): SEQUENCE_SHAPES,
    ("smoe", "bf16"): SEQUENCE_SHAPES[::3],
    ("xmoe", "fp32"): SEQUENCE_SHAPES[1::3],
    ("loss_free", "fp32"): SEQUENCE_SHAPES[2::3],
}


@pytest.mark.slow
@pytest.mark.parametrize(("work", "shapes"), SEQUENCE_WORKS.items(), ids=map("-".join, SEQUENCE_WORKS))
def test_sequence_parallel_equals_one_process(
    corpus: str, tmp_path: Path, work: tuple[str, str], shapes: list[Shape]
) -> None:
    assert_equals_one_process(corpus, tmp_path, Work(*work, extra=COMPARABLE), shapes)


def test_sequences_over_two_ranks_equal_one_process(corpus: str, tmp_path: Path) -> None:
    shapes = [Shape(2, 2, 3, False, True, 2)]
    assert_equals_one_process(corpus, tmp_path, Work("smoe", extra=COMPARABLE), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [True, False])
def test_offload_can_change_on_resuming(corpus: str, tmp_path: Path, stage: int, offload: bool) -> None:
    saving = {"checkpoint.every": 2, "training.steps": 4}
    before, after = (Work().settings | Shape(2, 2, stage, value).settings | saving for value in (offload, not offload))
    for output, settings in (("parts", before), ("whole", after)):
        run_distributed(runs, 2, corpus, str(tmp_path / output), [settings])
    run = tmp_path / "parts" / "run0"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "hf")
    run_distributed(runs, 2, corpus, str(tmp_path / "parts"), [after | {"checkpoint.resume": "must"}])
    ours, theirs = figures(run), figures(tmp_path / "whole" / "run0")
    assert ours[0] == pytest.approx(theirs[0], rel=2e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=3e-4)
    for name, weight in theirs[2].items():
        torch.testing.assert_close(ours[2][name], weight, rtol=2e-5, atol=2e-5)


def test_the_matrix_is_whole() -> None:
    combined = {shape for turn in range(len(WORKS)) for shape in covering(SHAPES, turn)}
    assert len(SHAPES) == 15
    assert len(combined) == 4 * len(SHAPES)
