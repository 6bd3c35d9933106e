"""Start the processes of one machine, and start them again when one is lost.

A run that lost a process cannot go on without it: its collectives wait for it. So the others end, by
themselves or by us, and all start again from the newest checkpoint. A process that fails twice in a row
at the same place is taken for a faulty device: the run goes on without it, if it can.

Several machines are Slurm's to start again: see slurm/.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from .elastic import Shape
from .errors import LOST
from .signals import INTERRUPTED, STOPPED, TERMINAL_SIGNALS

FINAL = {  # statuses after which starting again would not help, or was not asked for; the gravest first
    2: "a setting or the data is wrong, see above",
    3: "the run itself failed, see above",
    STOPPED: "a signal asked it to stop, and it saved a checkpoint",
    INTERRUPTED: "interrupted",
}
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, *TERMINAL_SIGNALS)  # each is a request to stop
POLL_SECONDS = 0.1
LONGEST_PAUSE = 30.0
_PR_SET_PDEATHSIG = 1  # prctl.h


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal; None: it did not, and we ended it."""

    rank: int
    status: int | None

    @property
    def text(self) -> str:
        if self.status is None:
            return f"rank {self.rank} did not end and was killed"
        if self.status < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-self.status).name}"
        return f"rank {self.rank} ended with status {self.status}"


@dataclass
class Supervisor:
    """Runs `command` on the processes of a shape until they finish.

    Args:
        command: program and arguments of every process; the shape's settings are appended when it has changed.
        shape_for: the shape for so many devices or processes, None where there is none.
        devices: those there are now, by the names that CUDA_VISIBLE_DEVICES takes; None: processes on the CPU.
        progress: what there is to continue from, for the messages.
        max_restarts, window_minutes: more restarts within that time mean giving up.
        grace_seconds: for the other processes to end when one has, and then again after SIGTERM.
        pause_seconds: before the first restart, doubled for each that follows.
    """

    command: list[str]
    processes: int
    shape_for: Callable[[int], Shape | None]
    devices: Callable[[], list[str] | None]
    progress: Callable[[], str]
    max_restarts: int = 3
    window_minutes: float = 60.0
    grace_seconds: float = 15.0
    pause_seconds: float = 1.0
    _left_out: set[str] = field(default_factory=set)  # devices that failed repeatedly
    _blamed: str | None = None
    _asked: int | None = None
    _on_gpu: bool = False
    _running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self) -> int:
        """The exit status of the run: 0, that of a failure which starting again does not mend, STOPPED or LOST."""
        restarts: list[float] = []
        with self._forwarding():
            while True:
                places = self._places()
                shape = self.shape_for(len(places))
                if shape is None:
                    self._say(f"no shape of the run fits the {len(places)} places that are left; giving up")
                    return LOST
                ended = self._attempt(shape, places)
                if not ended:
                    return self._stopped("nothing was running")
                failures = [process for process in ended if process.status != 0]
                if not failures:
                    return 0
                told = "; ".join(process.text for process in failures)
                for status, reason in FINAL.items():
                    for process in failures:
                        if process.status == status:
                            self._say(f"{process.text}: {reason}. Not started again")
                            return status
                if self._asked is not None:
                    return self._stopped(told)
                now = time.monotonic()
                restarts = [at for at in restarts if now - at < 60 * self.window_minutes]
                if len(restarts) >= self.max_restarts:
                    self._say(
                        f"{told}. Giving up after {len(restarts)} restarts within {self.window_minutes:g} minutes; "
                        f"the same command continues from {self.progress()}. Look at the first error above, and at "
                        "the machine (python launcher/doctor.py)"
                    )
                    return LOST
                restarts.append(now)
                self._blame(failures, places)
                self._say(f"{told}. Restart {len(restarts)} of {self.max_restarts}, from {self.progress()}")
                self._pause(min(LONGEST_PAUSE, self.pause_seconds * 2 ** (len(restarts) - 1)))

    def _stopped(self, told: str) -> int:
        """The status of a run that was asked to stop and has no process left, whichever way the last one ended."""
        assert self._asked is not None
        self._say(
            f"asked to stop by {signal.Signals(self._asked).name}: {told}. Not started again; the same command "
            f"continues from {self.progress()}"
        )
        return INTERRUPTED if self._asked == signal.SIGINT else STOPPED

    def _places(self) -> list[str]:
        """Where a process can run: devices, or numbers on the CPU, without those left out."""
        devices = self.devices()
        self._on_gpu = devices is not None
        places = [str(number) for number in range(self.processes)] if devices is None else devices
        return [place for place in places if place not in self._left_out][: self.processes]

    def _blame(self, failures: list[Ended], places: list[str]) -> None:
        """Leave out a place that two attempts in a row failed at, if that can be said of one."""
        causes = [process for process in failures if process.status != LOST]
        place = places[causes[0].rank] if causes else None
        if place is not None and place == self._blamed and len(places) > 1:
            self._left_out.add(place)
            self._say(f"place {place} failed twice in a row: going on without it")
            place = None
        self._blamed = place

    def _attempt(self, shape: Shape, places: list[str]) -> list[Ended]:
        """Start the processes; how they ended, in that order. Empty: a request to stop came first."""
        command = self.command + (shape.settings if shape.processes < self.processes else [])
        environment = os.environ | {
            "WORLD_SIZE": str(shape.processes),
            "LOCAL_WORLD_SIZE": str(shape.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        if self._on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(places[: shape.processes])
        ended: list[Ended] = []
        try:
            self._start(command, environment, shape.processes)
            while self._running and not any(process.status for process in ended):
                ended += self._reap()
            deadline = time.monotonic() + self.grace_seconds
            while self._running and time.monotonic() < deadline:
                ended += self._reap()
        finally:
            ended += self._end_all()
        return ended

    def _start(self, command: list[str], environment: dict[str, str], processes: int) -> None:
        """Start them, unless asked to stop. A signal meanwhile waits, and then reaches all of them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)

        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _die_with_parent()

        try:
            for rank in range(processes if self._asked is None else 0):
                variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._running[rank] = subprocess.Popen(command, env=variables, preexec_fn=prepare)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _reap(self) -> list[Ended]:
        """The processes that ended, after a little waiting."""
        time.sleep(POLL_SECONDS)
        ended = [Ended(rank, process.poll()) for rank, process in self._running.items() if process.poll() is not None]
        for process in ended:
            del self._running[process.rank]
        return ended

    def _end_all(self) -> list[Ended]:
        """End what still runs, kindly and then not: a stopped process hears only SIGKILL."""
        rest = [Ended(rank, None) for rank in self._running]
        for process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + self.grace_seconds
        while self._running and time.monotonic() < deadline:
            self._reap()
        for process in self._running.values():
            process.kill()
            process.wait()
        self._running.clear()
        return rest

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._asked is None:
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Within it, signals to us reach the processes, which may save a checkpoint, and end the run.

        Those that were blocked arrive at its beginning; those that are ignored, as under nohup, stay so.
        """

        def forward(number: int, _: FrameType | None) -> None:
            self._asked = number
            for process in self._running.values():
                process.send_signal(number)

        heard = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, forward) for number in heard}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    """In a new process: end when the supervisor does, however that ends (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
