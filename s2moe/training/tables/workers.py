"""Runs in worker processes: each imports everything once, and trains one run after another with one thread.

A worker ends with the process that started it, however that ends. What it says goes to a file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from s2moe.config.options import ConfigError

from .spec import Stage

RUNS = 40  # that a worker trains before a new one takes its place


@dataclass(frozen=True)
class Outcome:
    """What became of a run; without an error it is finished."""

    stage: Stage
    error: str = ""
    fatal: bool = False  # a mistake in the settings or the data, which the other runs would meet too


def train_all(chains: Sequence[Sequence[Stage]], jobs: int, log: Path) -> Iterator[Outcome]:
    """Train chains of runs, `jobs` at a time, and tell of each run when it ends. A chain ends with its first error.

    A run that begins with the weights of another one waits until that one is done.

    Args:
        log: where what the runs say goes.
    """
    waiting = [list(chain) for chain in chains if chain]
    free: list[_Worker] = []
    busy: dict[Any, tuple[_Worker, list[Stage]]] = {}
    started = 0
    pending = {str(stage.config.directory) for chain in chains for stage in chain}
    try:
        while waiting or busy:
            while len(busy) < jobs:
                place = next(
                    (n for n, chain in enumerate(waiting) if chain[0].config.init.weights not in pending), None
                )
                if place is None:
                    break
                if not free:
                    free.append(_Worker(started, log))
                    started += 1
                worker, chain = free.pop(), waiting.pop(place)
                worker.connection.send(chain[0])
                busy[worker.connection] = worker, chain
            for connection in wait(list(busy)):
                worker, chain = busy.pop(connection)
                outcome = worker.outcome(chain[0])
                done = [chain[0]] if not outcome.error else chain  # the rest of the chain has nothing to begin with
                pending -= {str(stage.config.directory) for stage in done}
                if len(chain) > len(done):
                    waiting.insert(0, chain[len(done) :])
                yield outcome
                if worker.is_usable():
                    free.append(worker)
                else:
                    worker.end()
    finally:
        for worker in [*free, *(worker for worker, _ in busy.values())]:
            worker.end()


class _Worker:
    def __init__(self, number: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._runs = 0
        self._process = context.Process(target=_work, args=(number, theirs, str(log)), daemon=True)
        self._process.start()
        theirs.close()

    def outcome(self, stage: Stage) -> Outcome:
        self._runs += 1
        try:
            error, fatal = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            self._runs = RUNS
            return Outcome(stage, f"its process ended with exit code {self._process.exitcode}")
        return Outcome(stage, error, fatal)

    def is_usable(self) -> bool:
        return self._runs < RUNS

    def end(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _work(number: int, connection: Connection, log: str) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    train = _prepare(number)
    while True:
        try:
            stage: Stage = connection.recv()
        except (EOFError, OSError):
            return
        print(f"--- {stage.label}: {stage.config.directory}", flush=True)
        connection.send(train(stage))


def _prepare(number: int) -> Any:
    """Import, and join a process group of one."""
    import torch

    from s2moe.data import CorpusError
    from s2moe.training.errors import TrainingError
    from s2moe.training.processes import describe_process, start_processes
    from s2moe.training.vision import train_vision

    if torch.cuda.is_available():  # workers take turns at the GPUs
        describe_process(os.environ)
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    processes = start_processes()

    def train(stage: Stage) -> tuple[str, bool]:
        try:
            train_vision(stage.config, processes)
        except (ConfigError, CorpusError) as error:
            return str(error), True
        except TrainingError as error:
            return str(error), False
        return "", False

    return train


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(OSError):
        parent.join()
    os._exit(1)
