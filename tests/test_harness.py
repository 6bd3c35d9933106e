"""The harness itself: results come back, failures are told, nothing is left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed_harness import DistributedError, reset_groups, run_distributed

pytestmark = pytest.mark.distributed


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def _facts() -> dict[str, object]:
    return {
        "rank": os.environ["RANK"],
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "random": torch.rand(1).item(),
    }


def _expert_groups_of_two_sizes() -> list[list[int]]:
    from deepspeed.utils import groups

    layouts = []
    for size in (2, 1):
        groups._create_expert_and_data_parallel(size)
        assert groups._get_max_expert_size() == size
        layouts.append(dist.get_process_group_ranks(groups._get_expert_parallel_group(f"ep_size_{size}")))
        reset_groups()
        assert not groups._get_expert_parallel_group_dict()
    dist.barrier()
    return layouts


def _second_rank_raises() -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == 1:
        raise ArithmeticError("the second rank's own words")
    dist.barrier()


def _second_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _starts_a_child_and_hangs(directory: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (directory / f"pids_{dist.get_rank()}").write_text(f"{os.getpid()} {child.pid}")
    print("about to hang")
    time.sleep(600)


def _returns_what_no_pickle_can_hold() -> object:
    return lambda: None


def _runs(pid: int) -> bool:
    """Whether a process exists and is more than a zombie waiting to be collected."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_results_come_back_in_rank_order():
    assert run_distributed(_sum_of_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]
    assert run_distributed("tests.test_harness:_sum_of_ranks", 3, 0) == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_ranks_are_set_up_alike_and_start_from_the_same_seed():
    first, second = run_distributed(_facts, 2)
    assert (first.pop("rank"), second.pop("rank")) == ("0", "1")
    assert first == second
    assert (first["backend"], first["threads"], first["cuda"]) == ("gloo", 1, False)


def test_tensors_travel_both_ways():
    results = run_distributed(_add_rank, 2, torch.arange(3.0))
    assert torch.equal(torch.stack(results), torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]))


def _add_rank(values: torch.Tensor) -> torch.Tensor:
    return values + dist.get_rank()


def test_groups_of_another_layout_after_a_reset():
    assert run_distributed(_expert_groups_of_two_sizes, 2) == [[[0, 1], [0]], [[0, 1], [1]]]


def test_a_rank_that_raises_is_reported_with_its_traceback():
    with pytest.raises(DistributedError) as caught:
        run_distributed(_second_rank_raises, 2)
    message = str(caught.value)
    assert "_second_rank_raises failed on 2 ranks" in message
    assert 'raise ArithmeticError("the second rank\'s own words")' in message
    assert "rank 0 was here" in message
    assert "rank 1 was here" in message


def test_a_rank_that_dies_is_reported():
    with pytest.raises(DistributedError, match="rank 1: ended with exit code 7"):
        run_distributed(_second_rank_dies, 2)


def test_time_up_kills_the_ranks_and_their_children(tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(DistributedError, match="did not finish within 3 s") as caught:
        run_distributed(_starts_a_child_and_hangs, 2, tmp_path, timeout=3.0)
    assert time.monotonic() - start < 30
    assert str(caught.value).count("about to hang") == 2
    pids = [int(pid) for file in tmp_path.glob("pids_*") for pid in file.read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 5
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _runs(pid)]


def test_a_result_that_cannot_be_pickled_is_that_rank_s_failure():
    with pytest.raises(DistributedError, match="rank 0: raised"):
        run_distributed(_returns_what_no_pickle_can_hold, 1)


def test_a_function_that_has_no_importable_name_is_refused():
    with pytest.raises(ValueError, match="top level of its module"):
        run_distributed(lambda: None, 2)
