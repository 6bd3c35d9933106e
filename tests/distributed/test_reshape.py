"""A run goes on with another number of processes, expert-parallel degree or ZeRO stage as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from s2moe.data import ByteTokenizer, write_corpus
from s2moe.training.checkpoint import list_complete
from tests.distributed import reshape_jobs, run_jobs
from tests.distributed.reshape_jobs import BEFORE
from tests.distributed.test_kill_and_resume import metrics
from tests.distributed_harness import DistributedError, run_distributed

pytestmark = pytest.mark.distributed

Shape = tuple[int, int, int]  # processes, expert-parallel degree, ZeRO stage
PARTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
SHAPES: list[Shape] = [(world, degree, stage) for stage in (1, 2, 3) for world, degree in PARTS]
# The load of the balance loss is that of one micro-batch, which does not depend on how many run side by side.
MOE = {"method": "smoe", "router": {"balance_scope": "local", "bias_update_rate": 0.01, "balance_loss": 0.1}}


def name_of(shape: Shape) -> str:
    return "world {} EP {} Z{}".format(*shape)


def write(shapes: list[Shape], folder: Path, moe: dict[str, Any] = MOE, freeze: str = "none", precision: str = "fp32"):
    for world in sorted({shape[0] for shape in shapes}):
        of_world = {name_of(shape): shape[1:] for shape in shapes if shape[0] == world}
        run_distributed(reshape_jobs.write, world, of_world, moe, freeze, precision, str(folder), timeout=400)


def resume(
    target: Shape,
    sources: list[Shape],
    folder: Path,
    moe: dict[str, Any] = MOE,
    freeze: str = "none",
    precision: str = "fp32",
) -> dict[str, list[float]]:
    names = [name_of(shape) for shape in sources]
    arguments = (target[1:], names, moe, freeze, precision, str(folder))
    return run_distributed(reshape_jobs.resume, target[0], *arguments, timeout=400)[0]


def losses_of(shape: Shape, moe: dict[str, Any] = MOE, freeze: str = "none", precision: str = "fp32") -> list[float]:
    return run_distributed(reshape_jobs.uninterrupted, shape[0], *shape[1:], moe, freeze, precision)[0]


@pytest.fixture(scope="module")
def truth() -> list[float]:
    """Losses of an uninterrupted run."""
    losses = losses_of((1, 1, 1))
    assert losses[-1] < losses[0] - 0.2
    return losses


FEW: list[Shape] = [(2, 2, 1), (2, 2, 3)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a few shapes."""
    folder = tmp_path_factory.mktemp("few")
    write(FEW, folder)
    return folder


@pytest.mark.parametrize("target", [(1, 1, 1), (2, 1, 3), (4, 2, 2)], ids=name_of)
def test_from_expert_parallel_2(truth: list[float], written: Path, target: Shape) -> None:
    for source, losses in resume(target, FEW, written).items():
        assert losses == pytest.approx(truth[BEFORE:], rel=2e-6), source


@pytest.fixture(scope="module")
def all_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all shapes."""
    folder = tmp_path_factory.mktemp("all")
    write(SHAPES, folder)
    return folder


def sources_of(target: Shape) -> list[Shape]:
    """Six of the 18 shapes, two of each stage."""
    part, stage = PARTS.index(target[:2]), target[2]
    return [shape for shape in SHAPES if (PARTS.index(shape[:2]) + part + shape[2] + stage) % 3 == 0]


@pytest.mark.slow
@pytest.mark.parametrize("target", SHAPES, ids=name_of)
def test_every_shape_from_six(truth: list[float], all_written: Path, target: Shape) -> None:
    """108 of the 324 pairs: all 36 changes of processes and experts, each at three of the 9 changes of the stage."""
    for source, losses in resume(target, sources_of(target), all_written).items():
        assert losses == pytest.approx(truth[BEFORE:], rel=2e-6), source


def test_the_pairs_are_spread_evenly() -> None:
    pairs = [(source, target) for target in SHAPES for source in sources_of(target)]
    assert len(pairs) == len(set(pairs)) == 108
    assert set(Counter((source[:2], target[:2]) for source, target in pairs).values()) == {3}
    assert set(Counter((source[2], target[2]) for source, target in pairs).values()) == {12}
    assert set(Counter(source for source, _ in pairs).values()) == {6}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moe", "freeze"),
    [
        ({"method": "s2moe", "router": {"balance_scope": "local"}}, "none"),
        ({"method": "stablemoe", "router": {"stage1_fraction": 0.5, "balance_scope": "local"}}, "none"),
        ({"method": "xmoe", "router": {"balance_scope": "local"}}, "routers_and_experts"),
        ({"method": "smoe", "expert_form": "mlp", "shared_experts": 1, **{"router": MOE["router"]}}, "experts"),
        (MOE, "routers"),
    ],
    ids=["s2moe", "stage flags", "frozen routers and experts", "frozen experts", "frozen routers"],
)
def test_frozen_weights_and_what_routers_keep(tmp_path: Path, moe: dict[str, Any], freeze: str) -> None:
    truth = losses_of((1, 1, 1), moe, freeze)
    write(FEW, tmp_path, moe, freeze)
    for target in [(1, 1, 2), (2, 1, 3), (2, 2, 1)]:
        for source, losses in resume(target, FEW, tmp_path, moe, freeze).items():
            assert losses == pytest.approx(truth[BEFORE:], rel=2e-6), (source, target)


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    """bf16 runs through another optimizer class at ZeRO 1. Sums in another order differ more."""
    write(FEW, tmp_path, precision="bf16")
    for shape in FEW:
        truth = losses_of(shape, precision="bf16")
        for target in [(1, 1, 1), (2, 1, 3), (2, 2, 2)]:
            losses = resume(target, [shape], tmp_path, precision="bf16")[name_of(shape)]
            assert losses[0] == pytest.approx(truth[BEFORE], rel=2e-4), (shape, target)
            assert losses == pytest.approx(truth[BEFORE:], rel=2e-3), (shape, target)


# --- why it is mended: these fail when DeepSpeed does better, and then the repair can go -----------------


def test_deepspeed_continues_another_degree_silently_wrong(truth: list[float], written: Path) -> None:
    losses = run_distributed(reshape_jobs.direct, 2, 1, 1, MOE, str(written), name_of((2, 2, 1)))[0]
    assert max(abs(ours - true) for ours, true in zip(losses, truth[BEFORE:], strict=True)) > 1e-3
    with pytest.raises(DistributedError):
        run_distributed(reshape_jobs.direct, 2, 1, 3, MOE, str(written), name_of((2, 2, 3)))


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_mixes_up_groups_steps_and_buffers(truth: list[float], written: Path, stage: int) -> None:
    found = run_distributed(reshape_jobs.unmended, 2, 1, stage, MOE, str(written), name_of((2, 2, stage)))[0]
    assert found["bias"] == 0
    if stage == 3:
        assert found["shared_step"]
        assert all(group == found["groups"][0] for group in found["groups"])
    assert max(abs(ours - true) for ours, true in zip(found["losses"], truth[BEFORE:], strict=True)) > 1e-4


# --- whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("corpus") / "text"
    words = random.Random(0).choices(["sparse ", "mixture ", "of ", "experts ", "collapse. "], k=3000)
    text = "".join(words)
    write_corpus(directory, "words", {"train": text, "valid": text[:700], "test": text[:300]}, ByteTokenizer())
    return str(directory)


def run(
    corpus: str, output: Path, shape: Shape, settings: dict[str, Any] | None = None, death: Any = None
) -> dict[str, Any]:
    """A run that saves after every second step, in one shape."""
    world, degree, stage = shape
    own = {
        "training.steps": 6,
        "training.expert_parallel": degree,
        "training.zero_stage": stage,
        "model.moe.router.balance_scope": "local",
        "checkpoint.every": 2,
        "evaluation.every": 0,
    }
    return run_distributed(run_jobs.run, world, corpus, str(output), {**own, **(settings or {})}, death, 0)[0]


@pytest.fixture(scope="module")
def whole(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The log of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    run(corpus, output, (1, 1, 1))
    return metrics(output)


@pytest.fixture
def stopped(corpus: str, tmp_path: Path) -> Path:
    """A run of two processes with a checkpoint after step 1, which is all it did. DeepSpeed escapes no path."""
    output = tmp_path / "lr=1e-3 [copy] (2+2)"
    assert run(corpus, output, (2, 2, 1), {"training.stop_after_minutes": 1e-9})["step"] == 1
    return output


def assert_same_log(output: Path, whole: list[dict[str, Any]]) -> None:
    log = metrics(output)
    assert [event["step"] for event in log] == [event["step"] for event in whole]
    for ours, theirs in zip(log, whole, strict=True):
        for key in ("train/loss", "val/bpc", "grad_norm", "samples", "lr"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours["step"])


def left_over(output: Path) -> list[str]:
    """What is in the directory of checkpoints beside them."""
    folder = output / "run" / "checkpoints"
    complete = {found.path for found in list_complete(folder)}
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path not in complete)


@pytest.mark.slow
def test_a_run_changes_its_shape_again_and_again(corpus: str, whole: list[dict[str, Any]], stopped: Path) -> None:
    for shape in [(1, 1, 3), (4, 2, 2)]:
        run(corpus, stopped, shape, {"checkpoint.resume": "must", "training.stop_after_minutes": 1e-9})
        assert left_over(stopped) == []
    assert run(corpus, stopped, (2, 1, 3), {"checkpoint.resume": "must"})["finished"]
    assert_same_log(stopped, whole)


@pytest.mark.parametrize(
    ("place", "call", "after"),
    [
        pytest.param("torch.save", 5, False, marks=pytest.mark.slow),
        ("manifest", 1, False),
        pytest.param("rename", 1, True, marks=pytest.mark.slow),
    ],
)
def test_killed_while_converting(
    corpus: str, whole: list[dict[str, Any]], stopped: Path, place: str, call: int, after: bool
) -> None:
    """Nothing that looks finished is left unless it is; the next start goes on."""
    with pytest.raises(DistributedError, match="exit code -9"):
        run(corpus, stopped, (1, 1, 1), death=(place, call, after))
    assert [found.state.step for found in list_complete(stopped / "run" / "checkpoints")] == [1]
    assert left_over(stopped) == ["universal-step-00000001" if after else ".tmp-universal-step-00000001"]
    assert run(corpus, stopped, (1, 1, 1), {"checkpoint.resume": "must"})["finished"]
    assert left_over(stopped) == []
    assert_same_log(stopped, whole)


@pytest.mark.slow
def test_a_conversion_is_used_again_unless_it_is_damaged(
    corpus: str, whole: list[dict[str, Any]], stopped: Path
) -> None:
    with pytest.raises(DistributedError, match="exit code -9"):
        run(corpus, stopped, (1, 1, 1), death=("rename", 1, True))
    universal = stopped / "run" / "checkpoints" / "universal-step-00000001"
    with pytest.raises(DistributedError, match="exit code -9"):  # it dies after loading, before the first save
        run(corpus, stopped, (1, 1, 1), death=("manifest", 1, False))
    assert left_over(stopped) == [".tmp-step-2", universal.name]
    file = next(universal.glob("zero/*w1/fp32.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run(corpus, stopped, (1, 1, 1), {"checkpoint.resume": "must"})["finished"]
    assert_same_log(stopped, whole)


def test_too_little_disk_space_is_said_before_anything_is_written(corpus: str, stopped: Path) -> None:
    with pytest.raises(
        DistributedError, match=r"converting .*step-00000001 for .* needs about .*B on the disk .* are free. Make"
    ):
        run_distributed("tests.distributed.reshape_jobs:run_on_a_full_disk", 1, corpus, str(stopped))
    assert left_over(stopped) == []


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [((2, 2, 2), (1, 1, 3)), ((2, 2, 3), (2, 1, 2))], ids=str)
def test_an_optimizer_in_the_hosts_memory(
    corpus: str, whole: list[dict[str, Any]], tmp_path: Path, source: Shape, target: Shape
) -> None:
    settings = {"training.offload_optimizer": True}
    run(corpus, tmp_path, source, {**settings, "training.stop_after_minutes": 1e-9})
    assert run(corpus, tmp_path, target, {**settings, "checkpoint.resume": "must"})["finished"]
    assert_same_log(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 2}, "seed was 1, is 2"),
        ({"training.precision": "bf16"}, "training.precision was fp32, is bf16"),
        ({"training.global_batch": 16}, "training.global_batch was 8, is 16"),
        ({"training.sequence_length": 16}, "training.sequence_length was 32, is 16"),
        ({"model.moe.expert_hidden": 64}, "model.moe.expert_hidden was 32, is 64"),
    ],
    ids=str,
)
def test_what_is_not_a_shape_is_refused(corpus: str, stopped: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(DistributedError, match=f"cannot continue from .*step-00000001: .*{named}"):
        run(corpus, stopped, (1, 1, 1), settings)


def test_converted_ahead_of_time(corpus: str, whole: list[dict[str, Any]], stopped: Path, tmp_path: Path) -> None:
    """As a run of its own, which leaves the first one as it was."""
    from s2moe.training.standalone import reshape_checkpoint
    from s2moe.training.weights import load_run_weights

    first, second = stopped / "run", tmp_path / "other" / "run"
    reshape_checkpoint(first, second)
    shutil.copy(first / "metrics.jsonl", second)  # to compare the whole log
    theirs = load_run_weights(first).state_dict()
    for name, weight in load_run_weights(second).state_dict().items():
        assert weight.equal(theirs[name]), name
    assert run(corpus, second.parent, (1, 1, 2), {"checkpoint.resume": "must"})["finished"]
    assert_same_log(second.parent, whole)
    assert left_over(stopped) == []
    place = reshape_checkpoint(first, None)
    assert place == first / "checkpoints" / "universal-step-00000001"


@pytest.mark.slow
def test_the_others_wait_as_long_as_the_first_process_goes_on() -> None:
    first, second = run_distributed(reshape_jobs.wait_for_first, 2, "done")
    assert first == {"progress": 4, "error": None}
    assert second["error"] is None
    assert second["progress"] >= 2
    for kind, said in (("refused", "too small"), ("broken", "rank 0: KeyError: 'gone'")):
        first, second = run_distributed(reshape_jobs.wait_for_first, 2, kind)
        assert said in second["error"]
    _, second = run_distributed(reshape_jobs.wait_for_first, 2, "stuck")
    assert second["progress"] == 0  # which its watchdog notices
