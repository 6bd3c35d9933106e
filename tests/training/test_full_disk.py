"""A full disk ends in one line, with the status that is not tried again, and says what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher import common
from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.config import ConfigError
from s2moe.disk import disk_is_full, naming
from s2moe.hub.directories import upcycle_directory
from s2moe.training.checkpoint import Saver, TrainingState, list_complete
from s2moe.training.errors import TrainingError
from s2moe.training.metrics_log import MetricsLog
from s2moe.training.tensorboard import TensorBoard
from tests.distributed_harness import run_distributed
from tests.forked import forked

from .disk_jobs import SMALL, full_disk, train_until_full
from .jobs import tiny_run


class Engine:
    """Writes one file, longer than there is room for from step 2 on."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = SimpleNamespace()

    def save_checkpoint(self, directory: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        path = Path(directory, tag)
        path.mkdir(parents=True)
        size = 10 if client_state["step"] < 2 else SMALL
        self.checkpoint_engine.save(torch.zeros(size), str(path / "weights.pt"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    saver = Saver(Engine(), tmp_path, keep=1, asynchronous=asynchronous)

    def save(step: int) -> None:
        saver.save(TrainingState(step=step))
        saver.settle(wait=True)

    with full_disk(), pytest.raises(TrainingError) as raised:
        save(2)
    said = "cannot write the checkpoint step-2: {}/.tmp-step-2/weights.pt: File too large: make room; "
    assert str(raised.value) == said.format(tmp_path) + "there is no checkpoint yet: the same command begins anew"
    save(1)
    with full_disk(), pytest.raises(TrainingError) as raised:
        save(2)
    rest = "the checkpoint of step 1 is intact: the same command continues from there"
    assert str(raised.value) == said.format(tmp_path) + rest
    assert [found.state.step for found in list_complete(tmp_path)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def log(folder: Path) -> None:
    written = MetricsLog(folder / "metrics.jsonl")
    for step in range(3):
        written.write(step, {"text": "x" * SMALL})


def board(folder: Path) -> None:
    written = TensorBoard(folder / "tensorboard")
    for step in range(3):
        written.matrices(step, {"noise": torch.rand(40, 40).tolist()})
    written.close()


def model(folder: Path) -> None:
    config = S2MoEConfig(vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    S2MoEForCausalLM(config).save_pretrained(folder / "hf")


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "metrics": (log, "metrics.jsonl"),
    "TensorBoard": (board, "tensorboard"),
    "a model": (model, ""),
    "a file of torch": (lambda folder: torch.save(torch.zeros(SMALL), folder / "optimizer.pt"), ""),
    "bytes": (lambda folder: (folder / "report.md").write_text("x" * 2 * SMALL) and None, ""),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_s_error_is_known_and_the_commands_say_one_line(tmp_path: Path, name: str) -> None:
    write, place = WRITERS[name]

    def command() -> None:
        common.quiet_libraries = lambda: None  # type: ignore[assignment]
        with full_disk():
            common.run(lambda arguments: write(tmp_path))

    ended = forked(command)
    lines = [line for line in ended.errors.splitlines() if "Writing model shards" not in line and line.strip()]
    assert len(lines) == 1, ended.errors
    assert lines[0].startswith("error: cannot write ")
    assert lines[0].endswith(": make room, and start it again")
    assert place in lines[0]
    assert ended.status == 3


def test_upcycling(tmp_path: Path) -> None:
    config = S2MoEConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, moe={"first_dense": 1}
    )
    S2MoEForCausalLM(config).save_pretrained(tmp_path / "hf")
    with full_disk(), pytest.raises(Exception) as raised:  # noqa: PT011 (of safetensors, or ours)
        upcycle_directory(tmp_path / "hf", tmp_path / "sparse", method="smoe", experts=2)
    assert disk_is_full(raised.value)
    assert not (tmp_path / "sparse").exists()


def test_preparing_data(tmp_path: Path) -> None:
    from data_prep.__main__ import main

    def prepare() -> None:
        with full_disk():
            raise SystemExit(main(["embedded", "--out", str(tmp_path / "data")]))

    ended = forked(prepare)
    assert ended.status == 2
    assert ended.errors.startswith("data_prep: error: ")
    assert "File too large" in ended.errors
    assert len(ended.errors.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_what_is_no_full_disk(tmp_path: Path) -> None:
    assert not disk_is_full(FileNotFoundError(2, "No such file or directory"))
    assert not disk_is_full(ConfigError("the disk said No space"))
    with pytest.raises(OSError, match=r"No space left on device: 'file'"), naming(Path("file")):
        raise OSError(28, "No space left on device")


@pytest.mark.distributed
def test_a_run_says_from_where_it_goes_on(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    overrides += ["logging.tensorboard=false", "training.expert_parallel=1"]
    (answer,) = run_distributed(train_until_full, 1, path, overrides, 0, 200)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert answer["error"] == (
        f"stopped after step 1: cannot write {metrics}: File too large: make room; there is no checkpoint yet: the "
        "same command begins anew"
    )
    (answer,) = run_distributed(train_until_full, 1, path, overrides, 3, 200)
    assert answer["error"].endswith("the checkpoint of step 2 is intact: the same command continues from there")
    (answer,) = run_distributed(train_until_full, 1, path, overrides, 100, 0)
    assert answer["finished"]
