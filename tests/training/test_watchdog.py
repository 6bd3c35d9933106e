"""The watchdog speaks when nothing goes on, and only then; what processes tell is read correctly."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from s2moe.training.errors import LostProcessError, TrainingError
from s2moe.training.processes import Processes
from s2moe.training.replicas import bit_sum
from s2moe.training.watchdog import Watchdog, is_lost_connection
from tests.distributed_harness import run_distributed

ALONE = Processes(0, 0, 1, torch.device("cpu"))
MINUTES = 0.3 / 60


def watched(seconds: float, moves: float | None) -> list[str]:
    """What a watchdog of 0.3 s says to a process that waits so long, and moves every so often."""
    said: list[str] = []
    with Watchdog(MINUTES, ALONE, said.append) as watchdog, watchdog.phase("training"):
        watchdog.state.step, watchdog.saved = 7, lambda: 5
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(moves or seconds)
            watchdog.move()
    return said


def test_it_says_once_where_nothing_goes_on() -> None:
    (message,) = watched(1.0, None)
    assert message.startswith(
        "no progress for 0.005 minutes (training.timeout_minutes) in training after step 7: there is no other process. "
    )
    assert "The checkpoint of step 5 is intact: the same command continues from there" in message


def test_it_says_nothing_while_something_goes_on() -> None:
    assert watched(1.5, 0.05) == []


def test_forward_passes_are_progress() -> None:
    said: list[str] = []
    module = torch.nn.Linear(1, 1)
    with Watchdog(MINUTES, ALONE, said.append) as watchdog:
        watchdog.watch(module)
        for _ in range(30):
            module(torch.zeros(1))
            time.sleep(0.03)
    assert said == []


def tell(silent: bool) -> str:
    """What rank 0 finds out about rank 1, which is silent or behind."""
    processes = Processes(dist.get_rank(), dist.get_rank(), 2, torch.device("cpu"))
    with Watchdog(1.0 / 60, processes, lambda message: None) as watchdog:
        if processes.rank == 0 or not silent:
            watchdog.move()
        if processes.rank == 0:
            watchdog.move()
        if processes.rank == 1 and silent:
            watchdog._over.set()
        time.sleep(0.5)
        found = watchdog.suspects() if processes.rank == 0 else ""
        dist.barrier()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("silent", "text"), [(True, "gives no sign of life ("), (False, "is behind the others (")])
def test_who_is_suspected(silent: bool, text: str) -> None:
    assert run_distributed(tell, 2, silent)[0].startswith(f"rank 1 {text}")


class MuteStore:
    """A store whose process is stopped: it does not answer, and raises after its timeout."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(60)
        raise RuntimeError("no answer")

    def set(self, key: str, value: str) -> None:
        time.sleep(60)
        raise RuntimeError("no answer")


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2moe.training.watchdog._own_store", MuteStore)
    monkeypatch.setattr("s2moe.training.watchdog.STORE_SECONDS", 0.1)
    said: list[str] = []
    two = Processes(1, 1, 2, torch.device("cpu"))
    begin = time.monotonic()
    watchdog = Watchdog(MINUTES, two, said.append)
    monkeypatch.setattr(watchdog, "_tell", lambda: None)  # the first sign is given while the store still answers
    with watchdog:
        while not said and time.monotonic() - begin < 20:
            time.sleep(0.1)
    assert "rank 0, which keeps the store that processes meet at, does not answer" in said[0]


def test_other_errors_are_left_alone() -> None:
    with Watchdog(1.0, ALONE) as watchdog:
        for error in (ValueError("gloo/"), TrainingError("lost: Connection reset by peer"), RuntimeError("shape")):
            with pytest.raises(type(error)) as found, watchdog.naming_lost():
                raise error
            assert found.value is error
        with pytest.raises(LostProcessError, match=r"contact with another process in start after step 0: there is"):
            _raise_within(watchdog, RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))


def _raise_within(watchdog: Watchdog, error: Exception) -> None:
    with watchdog.naming_lost():
        raise error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), True),
        (RuntimeError("Broken pipe"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_means_a_lost_connection(error: Exception, lost: bool) -> None:
    assert is_lost_connection(error) is lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_one_changed_bit_changes_the_sum(dtype: Any) -> None:
    tensor = torch.ones(4, 8).to(dtype)
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[5] ^= 1
    assert bit_sum(tensor) == bit_sum(tensor.clone())
    assert bit_sum(tensor) != bit_sum(other)
    assert bit_sum(tensor[:, ::2]) == bit_sum(tensor[:, ::2].contiguous())
    assert bit_sum(tensor[0, 0]).dtype == torch.int64
