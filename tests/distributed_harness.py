"""Run a function on several ranks from a test: one process a rank, talking over gloo on the CPU.

    def sum_of_ranks(offset):                  # at the top level of a module
        value = torch.tensor([dist.get_rank() + offset])
        dist.all_reduce(value)
        return value.item()                    # anything that can be pickled

    def test_sum():
        assert run_distributed(sum_of_ranks, 2, 10) == [21, 21]

Importing torch, DeepSpeed and transformers takes many seconds, starting a rank should not. So one
server process imports them once in a test session, and every call forks its ranks from it: the first
call pays the imports, the following ones a few tenths of a second, and each still gets new processes
with a new default process group and nothing left over from the call before.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

PRELOAD = [
    "torch",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # the engine asks it about every optimizer
    "transformers.modeling_utils",
    "matplotlib.figure",  # every finished run draws its curves
    "sklearn.datasets",  # where the images of `digits` are
    "s2moe",
    "tests.preloaded",  # last
]
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
IMPORT_SECONDS = 240.0
GRACE_SECONDS = 3.0  # after one rank has failed, for the others to say what they know
TAIL_LINES = 30


class DistributedError(Exception):
    """A rank raised, died or did not finish. The message holds every rank's traceback or last output."""


def run_distributed(
    function: Callable[..., Any] | str, world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return their results in rank order.

    On every rank the default process group exists (gloo, made by `deepspeed.init_distributed`), RANK,
    WORLD_SIZE and LOCAL_RANK are set as a launcher sets them, and torch's seed is 0.

    Args:
        function: a function at the top level of an importable module, or its name "package.module:function".
        world_size: number of ranks.
        args: the same for every rank; they travel by pickle.
        timeout: seconds for the whole call, the imports of the first one not counted.

    Raises:
        DistributedError: a rank failed or the time was up; no process is left running.
    """
    name = function if isinstance(function, str) else _importable_name(function)
    context = _fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
        directory = Path(temporary)
        (directory / "args").write_bytes(pickle.dumps(args))
        ranks = [
            context.Process(target=_rank_main, args=(name, rank, world_size, directory)) for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            finished = _wait(ranks, directory, timeout)
            outcomes = [_Outcome(directory, rank, process) for rank, process in enumerate(ranks)]
        finally:
            for process in ranks:
                _kill(process)
        if not all(outcome.succeeded for outcome in outcomes):
            what = "failed" if finished else f"did not finish within {timeout:g} s"
            report = "\n".join(outcome.report() for outcome in outcomes)
            raise DistributedError(f"{name} {what} on {world_size} ranks\n{report}")
        return [outcome.result() for outcome in outcomes]


def reset_groups() -> None:
    """Destroy all process groups and DeepSpeed's record of them, and make a new default group.

    For a function that goes through several parallel layouts in one call: DeepSpeed keeps the first
    expert-parallel groups it makes. To be called by all ranks at the same point.
    """
    import deepspeed
    import torch.distributed as dist

    dist.barrier()
    deepspeed.comm.destroy_process_group()
    _join_group(Path(os.environ["RANKS_DIRECTORY"]))


# --- in the test process -------------------------------------------------------------------------


def _importable_name(function: Callable[..., Any]) -> str:
    if "<" in function.__qualname__:  # <lambda>, <locals>
        raise ValueError(
            f"{function.__qualname__} cannot be found by name in another process: "
            "move it to the top level of its module"
        )
    return f"{function.__module__}:{function.__qualname__}"


@functools.cache
def _fork_server() -> ForkServerContext:
    """Start the server and wait until it has imported everything in PRELOAD."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, RANK_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    probe = context.Process(target=os.getpid)
    probe.start()
    probe.join(IMPORT_SECONDS)
    if probe.exitcode != 0:
        probe.kill()
        raise DistributedError(
            f"the process that ranks are forked from did not import {PRELOAD} within {IMPORT_SECONDS:g} s"
        )
    return context


def _wait(ranks: list[ForkServerProcess], directory: Path, timeout: float) -> bool:
    """Wait for all ranks, for `timeout` seconds or until shortly after one failed. False: time was up."""
    deadline = time.monotonic() + timeout
    failed = False
    running = dict(enumerate(ranks))
    while running:
        wait([process.sentinel for process in running.values()], max(0.0, deadline - time.monotonic()))
        ended = [rank for rank, process in running.items() if process.exitcode is not None]
        for rank in ended:
            del running[rank]
            if not _result_file(directory, rank).exists() and not failed:
                failed = True
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() >= deadline and running:
            return failed
    return True


def _kill(process: ForkServerProcess) -> None:
    """End a rank that still runs, and what it started itself."""
    if process.pid is None or process.exitcode is not None:
        return
    with suppress(ProcessLookupError):  # it has not become a group leader yet, or is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


class _Outcome:
    """What became of one rank."""

    def __init__(self, directory: Path, rank: int, process: ForkServerProcess):
        self.directory, self.rank, self.exitcode = directory, rank, process.exitcode
        self.succeeded = _result_file(directory, rank).exists()

    def result(self) -> Any:
        return pickle.loads(_result_file(self.directory, self.rank).read_bytes())

    def report(self) -> str:
        error = _error_file(self.directory, self.rank)
        if self.succeeded:
            return f"--- rank {self.rank}: finished"
        if error.exists():
            return f"--- rank {self.rank}: raised\n{error.read_text()}{self._tail()}"
        if self.exitcode is None:
            return f"--- rank {self.rank}: was still running and was stopped\n{self._tail()}"
        return f"--- rank {self.rank}: ended with exit code {self.exitcode} and no result\n{self._tail()}"

    def _tail(self) -> str:
        log = _log_file(self.directory, self.rank)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(["last output:", *("  " + line for line in lines[-TAIL_LINES:])]) if lines else ""


# --- in a rank -----------------------------------------------------------------------------------


def _rank_main(name: str, rank: int, world_size: int, directory: Path) -> None:
    os.setsid()
    threading.Thread(target=_end_with_the_test_process, daemon=True).start()
    log = os.open(_log_file(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        result = _call(name, rank, world_size, directory)
    except BaseException:
        _write(_error_file(directory, rank), traceback.format_exc().encode())
        raise SystemExit(1) from None
    _write(_result_file(directory, rank), result)
    _leave_together()


def _call(name: str, rank: int, world_size: int, directory: Path) -> bytes:
    import torch

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(RANKS_DIRECTORY=str(directory), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if "lo" in (interface for _, interface in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's own name resolves to
    torch.manual_seed(0)
    _join_group(directory)
    module, function = name.split(":")
    args = pickle.loads((directory / "args").read_bytes())
    result = getattr(importlib.import_module(module), function)(*args)
    return pickle.dumps(result)


_groups_made = 0


def _join_group(directory: Path) -> None:
    """Make the default process group, through a file of its own: no port that another test could take."""
    import deepspeed

    global _groups_made
    _groups_made += 1
    # DeepSpeed would compile this at the first start, for a minute; only its inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "gloo",
        verbose=False,
        init_method=f"file://{directory}/store_{_groups_made}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _leave_together() -> None:
    """Wait for the other ranks, which may still be receiving. One that failed is no concern any more."""
    import torch.distributed as dist

    with suppress(RuntimeError):
        if dist.is_initialized():
            dist.barrier()
    sys.stdout.flush()


def _end_with_the_test_process() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(os.getpid(), signal.SIGKILL)


# --- the files they share ------------------------------------------------------------------------


def _result_file(directory: Path, rank: int) -> Path:
    return directory / f"result_{rank}"


def _error_file(directory: Path, rank: int) -> Path:
    return directory / f"error_{rank}"


def _log_file(directory: Path, rank: int) -> Path:
    return directory / f"log_{rank}"


def _write(path: Path, content: bytes) -> None:
    """All of `content` or no file at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(path)
