"""A signal asks the run to stop: it saves a checkpoint and ends, so that the same command continues exactly.

Batch systems announce a time limit or a preemption by a signal, to one process or to all, at any moment,
while a checkpoint is being written included, and often more than once. So the handler only notes it. The
training loop asks at every step boundary, with an all-reduce: when any process was asked, all save the
same step. A signal during a validation or a checkpoint counts at the next boundary; another one changes
nothing. SIGKILL is left to those who cannot wait.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # exit status of a run that a signal stopped: sysexits.h calls it a temporary failure, "try again"

_received: signal.Signals | None = None


def catch_stop_signals() -> None:
    """From now on a stop signal is noted instead of ending the process. For the main thread.

    Those that were blocked arrive now.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
        signal.siginterrupt(number, False)  # no system call of a library that is writing a file fails for it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def stop_signal() -> signal.Signals | None:
    """The first stop signal that this process received, if any."""
    return _received


def _note(number: int, _: FrameType | None) -> None:
    global _received
    _received = _received or signal.Signals(number)
