"""A signal asks the run to stop: it saves a checkpoint and ends, so that the same command continues exactly.

Batch systems announce a time limit or a preemption by a signal, to one process or to all, at any moment,
while a checkpoint is being written included, and often more than once. So the handler only notes it. The
training loop asks at every step boundary, with an all-reduce: when any process was asked, all save the
same step. A signal during a validation or a checkpoint counts at the next boundary; another one changes
nothing. SIGKILL is left to those who cannot wait.

Ctrl-C and the closing of a terminal do the same. Who cannot wait presses Ctrl-C again: that ends the process at
once, from a thread, wherever its main thread waits. The first Ctrl-C often comes twice within moments, from the
terminal and from the launcher that passes it on, so the second one counts after a while only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # `nohup` and `&` in a script have them ignored, and so they stay
STOPPED = 75  # exit status of a run that a signal stopped: sysexits.h calls it a temporary failure, "try again"
INTERRUPTED = 130  # of a process that Ctrl-C ended at once, as shells have it
AGAIN_SECONDS = 1.0  # after which another Ctrl-C is a second one
HINT = "Ctrl-C: a checkpoint is saved at the end of this step, and the run stops. A second Ctrl-C ends it at once"

_received: signal.Signals | None = None
_losses: list[Callable[[], str]] = []  # the innermost `losing` last


def catch_stop_signals() -> None:
    """From now on a stop signal is noted instead of ending the process. For the main thread.

    Those that were blocked arrive now.
    """
    for number in stop_signals():
        signal.signal(number, _note)
        signal.siginterrupt(number, False)  # no system call of a library that is writing a file fails for it
    _hear_ctrl_c()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that ask this process to stop."""
    heard = [number for number in TERMINAL_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return (*STOP_SIGNALS, *heard)


def stop_signal() -> signal.Signals | None:
    """The first stop signal that this process received, if any."""
    return _received


@contextlib.contextmanager
def losing(account: Callable[[], str]) -> Iterator[None]:
    """Within it, a second Ctrl-C says with `account` what it loses. Called from another thread."""
    _losses.append(account)
    try:
        yield
    finally:
        _losses.pop()


def loss(step: int, saved: int | None) -> str:
    """For the user: what ending after `step` loses where the newest complete checkpoint is that of step `saved`."""
    if saved is None:
        return f"after step {step}: there is no checkpoint yet, and the same command begins anew"
    if saved >= step:
        return f"after step {step}: the checkpoint has it, and the same command continues from there"
    lost = f"the {step - saved} steps" if step - saved > 1 else "the step"
    return f"after step {step}: {lost} since the checkpoint of step {saved} will be done again by the same command"


def _note(number: int, _: FrameType | None) -> None:
    global _received
    _received = _received or signal.Signals(number)


def _hear_ctrl_c() -> None:
    """Let a thread see every signal: the main thread may wait in a collective, where no handler runs."""
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    before = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    if before != -1:
        os.close(before)  # the thread of an earlier call ends
    threading.Thread(target=_listen, args=(hears,), name="Ctrl-C", daemon=True).start()


def _listen(hears: int) -> None:
    first: float | None = None
    while numbers := os.read(hears, 64):
        now = time.monotonic()
        if signal.SIGINT not in numbers:
            continue
        if first is None:
            first = now
            _say(HINT, "LOCAL_RANK")
        elif now - first > AGAIN_SECONDS:
            _say(f"interrupted {_losses[-1]() if _losses else 'before the first step'}", "RANK")
            os._exit(INTERRUPTED)
    os.close(hears)


def _say(text: str, rank: str) -> None:
    """By one process of the machine, or of the run. Past Python's streams, which the main thread may be using."""
    if os.environ.get(rank, "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
