"""No run hangs longer than `training.timeout_minutes`, and none dies without saying which process was lost.

Every process tells a store (that of the process group) where it is, from a thread of its own. When a
process has made no progress for too long, it says which process is behind or silent, where it is
itself, and ends with status LOST; its launcher then ends the others. A process that is stopped or
unreachable cannot say anything, so the others do: their waiting for it is no progress either.

Not a barrier with a timeout before each collective: DeepSpeed's own collectives would not have one,
and a thread notices everything else that hangs too, a file system or a device.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .checkpoint import TrainingState
from .errors import LOST, LostProcessError, TrainingError, remains
from .processes import Processes
from .signals import loss

STORE_SECONDS = 5.0  # to wait for an answer of the store
ASKING = 16  # processes that ask the store about all others: a thousand asking about a thousand would choke it
STACK = 6  # innermost calls that are shown of where the process waits
NAMED = 8  # processes that a message names at most
LOST_CONTACT = "lost contact"  # why a process left that is not the cause of what happened


@dataclass(frozen=True)
class Sign:
    """What a process tells the others: signs given so far, times it moved on, where it is, and why it left."""

    signs: int
    moves: int
    step: int
    phase: str
    host: str
    left: str | None


class Watchdog:
    """Watches this process while it is entered.

    Args:
        minutes: without progress, after which the process ends.
        abort: called with the message when the time is up.

    Attributes:
        state: of the run, once there is one; its `step` is told.
        saved: says the step of the newest complete checkpoint, once that is known; without a look at the file system,
            which may be what hangs.
    """

    def __init__(
        self,
        minutes: float,
        processes: Processes,
        abort: Callable[[str], None] | None = None,
    ) -> None:
        self.state = TrainingState()
        self.saved: Callable[[], int | None] | None = None
        self._limit = 60 * minutes
        self._interval = min(2.0, self._limit / 10)
        self._processes = processes
        self._abort = abort or _abort
        self._phase = "start"
        self._left: str | None = None
        self._moves = self._signs = 0
        self._waited = 0.0
        self._over = threading.Event()
        self._store = _own_store() if processes.world_size > 1 else None

    def __enter__(self) -> Watchdog:
        self._tell()
        for work in (self._watch, self._keep_telling):
            threading.Thread(target=work, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        self._over.set()
        if error is not None and self._left is None:
            self._leave(" ".join(f"{type(error).__name__}: {error}".split())[:300])

    def move(self) -> None:
        """This process has made progress."""
        self._moves += 1
        self._waited = 0.0

    def watch(self, module: torch.nn.Module) -> None:
        """Every forward pass is progress, of training, validation and probes alike."""
        module.register_forward_pre_hook(lambda *_: self.move())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it, this process does what `name` says; an error leaves it there, for the message to say."""
        before, self._phase = self._phase, name
        self.move()
        yield
        self._phase = before
        self.move()

    @contextlib.contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Within it, a broken connection to another process is a LostProcessError that names it."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, TrainingError) or not is_lost_connection(error):
                raise
            text = " ".join(str(error).split()).partition(" This is typically")[0][:200]
            lost = self.suspects()
            self._leave(LOST_CONTACT)
            raise LostProcessError(
                f"lost contact with another process {self._where()}: {lost} ({text}). {self._remedy()}"
            ) from error

    def suspects(self) -> str:
        """Which processes left, give no sign any more, or are behind the others, and where they were."""
        world, ours = self._processes.world_size, self._processes.rank
        if self._store is None:
            return "there is no other process"
        if ours % max(1, world // ASKING):
            return "which one is said by other processes"
        return _within(
            2 * self._interval + 0.5 + STORE_SECONDS,
            self._ask,
            "rank 0, which keeps the store that processes meet at, does not answer",
        )

    def _ask(self) -> str:
        world, ours = self._processes.world_size, self._processes.rank
        before = self._read()
        time.sleep(2 * self._interval + 0.5)
        after = self._read()
        told = [
            f"rank {rank} on {sign.host} left with {sign.left}"
            for rank, sign in after.items()
            if sign.left not in (None, LOST_CONTACT)
        ]
        there = {rank: sign for rank, sign in after.items() if sign.left is None}
        told += [
            f"rank {rank} gives no sign of life ({_place(sign)})"
            for rank, sign in there.items()
            if rank != ours and rank in before and before[rank].signs == sign.signs
        ]
        told += [f"rank {rank} never gave a sign of life" for rank in range(world) if rank not in after]
        if told:
            return _listed(told)
        moves = {rank: sign.moves for rank, sign in after.items()}
        last = min(moves.values())
        if last == max(moves.values()):
            return f"all processes are at the same place ({self._where()}): a collective does not end"
        behind = [rank for rank, count in moves.items() if count == last]
        return _listed([f"rank {rank} is behind the others ({_place(after[rank])})" for rank in behind])

    def _watch(self) -> None:
        """A thread. It counts its own turns: time in which the whole process was stopped is none of waiting."""
        while not self._over.wait(self._interval):
            self._waited += self._interval
            if self._waited > self._limit:
                message = (
                    f"no progress for {self._limit / 60:g} minutes (training.timeout_minutes) {self._where()}: "
                    f"{self.suspects()}. {self._remedy()}. If nothing hangs and steps, validations or checkpoints take "
                    "that long, raise training.timeout_minutes"
                )
                if self._over.is_set() or self._waited < self._limit:  # it went on while we asked
                    continue
                self._leave(LOST_CONTACT)
                self._abort(message)
                return

    def _leave(self, reason: str) -> None:
        self._left = reason
        _within(STORE_SECONDS, self._tell, None)

    def _keep_telling(self) -> None:
        """Another thread: the store may never answer, for all its timeout, when its process is stopped."""
        while not self._over.wait(self._interval):
            self._signs += 1
            self._tell()

    def _tell(self) -> None:
        if self._store is None:
            return
        host = socket.gethostname()
        sign = Sign(self._signs, self._moves, self.state.step, self._phase, host, self._left)
        with contextlib.suppress(RuntimeError):  # told at the next turn, or the others find out that we are silent
            self._store.set(_key(self._processes.rank), json.dumps(asdict(sign)))

    def _read(self) -> dict[int, Sign]:
        assert self._store is not None
        keys = {rank: _key(rank) for rank in range(self._processes.world_size)}
        return {
            rank: Sign(**json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }

    def remains(self) -> str:
        """For the user: from where the same command goes on."""
        if self.saved is None:
            return "the same command continues from the newest complete checkpoint, if there is one"
        return remains(self.saved())

    def loss(self) -> str:
        """For the user: what ending here loses."""
        return "before the first step" if self.saved is None else loss(self.state.step, self.saved())

    def _remedy(self) -> str:
        told = self.remains()
        return f"{told[0].upper()}{told[1:]} (launcher/supervise.py does so by itself)"

    def _where(self) -> str:
        return f"in {self._phase} after step {self.state.step}"


def _within(seconds: float, ask: Callable[[], Any], otherwise: Any) -> Any:
    """What `ask` returns, or `otherwise` when it fails or takes longer."""
    answers: list[Any] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=work, name="watchdog asks", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of torch means that another process, or the way to it, is gone.

    NCCL has a class of its own for that; gloo says it by a plain RuntimeError that names its source file.
    """
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return "gloo/" in text or any(
        part in text for part in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )


def _own_store() -> Any:
    """A connection of our own to the process group's store: the main thread may be waiting on the other one."""
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()
    store.set_timeout(timedelta(seconds=STORE_SECONDS))  # of some of its methods; see _within for the others
    return store


def _key(rank: int) -> str:
    return f"s2moe/watchdog/{rank}"


def _place(sign: Sign) -> str:
    return f"on {sign.host}, last in {sign.phase} after step {sign.step}"


def _listed(told: list[str]) -> str:
    more = len(told) - NAMED
    return "; ".join(told[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _abort(message: str) -> None:
    """End this process: its main thread waits for something that does not come, and cannot be told to stop."""
    where = f"[rank {os.environ.get('RANK', '0')} on {socket.gethostname()}]"
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = "".join(traceback.format_stack(frame)[-STACK:]) if frame is not None else ""
    print(f"{where} waits here:\n{stack}{where} error: {message}", file=sys.stderr, flush=True)
    os._exit(LOST)
