"""A run killed at any moment, while writing a checkpoint included, resumes to what it would have been."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from s2moe.data import ByteTokenizer, write_corpus
from tests.distributed import run_jobs
from tests.distributed_harness import DistributedError, run_distributed
from tests.run_logs import reproducible_events

pytestmark = pytest.mark.distributed

STEPS = run_jobs.RUN["training.steps"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("corpus") / "text"
    words = random.Random(0).choices(["sparse ", "mixture ", "of ", "experts ", "collapse. "], k=3000)
    text = "".join(words)
    write_corpus(directory, "words", {"train": text, "valid": text[:700], "test": text[:300]}, ByteTokenizer())
    return str(directory)


@pytest.fixture(scope="module")
def uninterrupted(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    run(corpus, output, {})
    return output


def run(corpus: str, output: Path, settings: dict[str, Any], death: Any = None, victim: int = 0) -> dict[str, Any]:
    return run_distributed(run_jobs.run, 2, corpus, str(output), settings, death, victim)[0]


def metrics(output: Path) -> list[dict[str, Any]]:
    return reproducible_events(output / "run")


def assert_same_run(output: Path, reference: Path) -> None:
    """Every logged figure and every final weight is equal, bit for bit."""
    assert metrics(output) == metrics(reference)
    ours, theirs = (load_file(path / "run" / "hf" / "model.safetensors") for path in (output, reference))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.equal(theirs[name]), name


def test_the_log_of_an_uninterrupted_run_is_complete(uninterrupted: Path) -> None:
    steps = [event["step"] for event in metrics(uninterrupted) if "train/loss" in event]
    assert steps == list(range(1, STEPS + 1))
    losses = [event["train/loss"] for event in metrics(uninterrupted) if "train/loss" in event]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_stopped_and_resumed_equals_uninterrupted(corpus: str, tmp_path: Path, stage: int) -> None:
    settings = {"training.zero_stage": stage}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(corpus, whole, settings)
    first = run(corpus, parts, {**settings, "training.stop_after_minutes": 1e-9})
    assert not first["finished"]
    assert first["step"] == 1
    with pytest.raises(DistributedError):
        run(corpus, parts, settings, ("engine files synced", 1, False))
    last = run(corpus, parts, settings)
    assert last["finished"]
    assert_same_run(parts, whole)


# The second checkpoint (step 6) is being written when the rank dies; only the third removes an old one.
@pytest.mark.parametrize(
    ("place", "call", "after", "victim", "survives"),
    [
        pytest.param("torch.save", 8, False, 0, "step-00000003", marks=pytest.mark.slow),
        pytest.param("torch.save", 9, True, 1, "step-00000003", marks=pytest.mark.slow),
        ("manifest", 2, False, 0, "step-00000003"),
        pytest.param("manifest", 2, True, 0, "step-00000003", marks=pytest.mark.slow),
        pytest.param("rename", 2, False, 0, "step-00000003", marks=pytest.mark.slow),
        ("rename", 2, True, 0, "step-00000006"),
        pytest.param("rename", 4, True, 0, "step-00000009", marks=pytest.mark.slow),
        pytest.param("old one removed", 1, False, 0, "step-00000009", marks=pytest.mark.slow),
        pytest.param("old one removed", 1, True, 0, "step-00000009", marks=pytest.mark.slow),
    ],
)
def test_killed_while_writing_a_checkpoint(
    corpus: str, uninterrupted: Path, tmp_path: Path, place: str, call: int, after: bool, victim: int, survives: str
) -> None:
    with pytest.raises(DistributedError, match="exit code -9"):
        run(corpus, tmp_path, {}, (place, call, after), victim)
    assert run_jobs.checkpoints_of(tmp_path)[-1] == survives
    assert run(corpus, tmp_path, {})["finished"]
    assert_same_run(tmp_path, uninterrupted)
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
def test_killed_at_random_moments_until_done(corpus: str, uninterrupted: Path, tmp_path: Path) -> None:
    moments = random.Random(1)
    kills = 0
    for attempt in range(40):
        try:
            result = run(corpus, tmp_path, {}, moments.uniform(0.5, 4.0), attempt % 2)
        except DistributedError as error:
            if "exit code -9" not in str(error):
                raise  # not the death we sent
            kills += 1
        else:
            assert result["finished"]
            break
    else:
        pytest.fail("no attempt lived long enough")
    assert kills > 0
    assert_same_run(tmp_path, uninterrupted)


def test_another_run_is_refused(corpus: str, uninterrupted: Path) -> None:
    with pytest.raises(DistributedError, match=r"cannot continue from .*step-00000012: seed was 1, is 2"):
        run(corpus, uninterrupted, {"seed": 2})


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(corpus: str, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(DistributedError):
        run(corpus, tmp_path, {}, ("rename", 4, True))
    newest = tmp_path / "run" / "checkpoints" / "step-00000009"
    damaged = next(newest.glob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run_jobs.checkpoints_of(tmp_path) == ["step-00000006"]
    assert run(corpus, tmp_path, {})["finished"]
    assert_same_run(tmp_path, uninterrupted)


# --- written behind training -----------------------------------------------------------------------------

BEHIND = {"checkpoint.asynchronous": True}


@pytest.mark.parametrize(
    ("place", "call", "victim"),
    [("engine files synced", 9, 1), pytest.param("manifest", 2, 0, marks=pytest.mark.slow)],
)
def test_killed_while_writing_behind_training(
    corpus: str, uninterrupted: Path, tmp_path: Path, place: str, call: int, victim: int
) -> None:
    with pytest.raises(DistributedError, match="exit code -9"):
        run(corpus, tmp_path, BEHIND, (place, call, False), victim)
    assert run_jobs.checkpoints_of(tmp_path) == ["step-00000003"]
    assert run(corpus, tmp_path, {**BEHIND, "checkpoint.resume": "must"})["finished"]
    assert_same_run(tmp_path, uninterrupted)
    assert run_jobs.checkpoints_of(tmp_path) == ["step-00000009", "step-00000012"]


def test_a_full_disk_behind_training_ends_the_run_on_all_ranks(corpus: str, tmp_path: Path) -> None:
    message = r"(?s)rank 0: raised.*TrainingError: cannot write the checkpoint step-6: .*No space left.*rank 1: raised"
    with pytest.raises(DistributedError, match=message):
        run_distributed(run_jobs.run_until_the_disk_is_full, 2, corpus, str(tmp_path), BEHIND)
    assert run_jobs.checkpoints_of(tmp_path) == ["step-00000003"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_written_behind_training_it_is_the_same_run(corpus: str, tmp_path: Path, stage: int) -> None:
    settings = {"training.zero_stage": stage}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(corpus, whole, settings)
    assert run(corpus, parts, {**settings, **BEHIND, "training.stop_after_minutes": 1e-9})["step"] == 1
    assert run(corpus, parts, {**settings, **BEHIND, "checkpoint.resume": "must"})["finished"]
    assert_same_run(parts, whole)
