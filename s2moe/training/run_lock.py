"""One start of a run at a time, in a directory that all its processes see.

Process 0 holds a lock on the file `run.lock` of the run directory. The system lets go of it when the process ends,
however it ends, so what a killed run leaves of the file stops nobody. What stands in it is for messages, and for the
other processes: one that does not find it is on a machine with another file system, and would write its part of every
checkpoint where nobody looks for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from s2moe.config.options import ConfigError

from .agreement import together
from .environment import number
from .processes import Processes
from .ranks import from_first

LOCK_FILE = "run.lock"
SEEN_SECONDS = 5.0  # for a network file system to show what another machine wrote
POLL_SECONDS = 0.1
CONTINUE = "Wait until that ends or stop it, and start again to continue; or choose another name=... for this run"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # by another process; anything else: there are no locks here
_descriptors: set[int] = set()  # of the locks of this process


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. `job` is the batch system's, `restart` how often that has requeued it."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    job: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    restart: int = field(default_factory=lambda: number(os.environ, "SLURM_RESTART_COUNT", 0))
    since: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(" ", "seconds"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def follows(self, other: Owner) -> bool:
        """Whether this is the same job, requeued: the batch system has ended the other, or lost its machine.

        A file server may keep the lock of a machine that died for minutes, or until that is up again.
        """
        return self.job != "" and self.job == other.job and self.restart > other.restart

    @property
    def text(self) -> str:
        return f"process {self.pid} on {self.host}{f', job {self.job}' if self.job else ''}, since {self.since}"


@contextlib.contextmanager
def locked(directory: Path, processes: Processes) -> Iterator[None]:
    """Within it, no other start of the run uses its directory, and all processes see the same one. Collective.

    Raises:
        ConfigError: on every process: another start uses it, it cannot be written, or a process does not see it.
    """
    with contextlib.ExitStack() as stack:
        with together(processes):
            use = f"{directory} is in use by another start of this run", CONTINUE
            owner = stack.enter_context(locked_alone(directory, *use)) if processes.is_main else None
        if processes.world_size > 1:
            holder, there = from_first((owner, directory.resolve()))
            assert holder is not None
            with together(processes):
                _require_seen(directory, holder, there)
        yield


@contextlib.contextmanager
def locked_alone(directory: Path, used: str, remedy: str) -> Iterator[Owner]:
    """Within it, this process holds the lock of a directory, which is made for it where there is none.

    Args:
        used: for the user, where another process holds it: what it does there.
        remedy: and what to do.

    Raises:
        ConfigError: another process holds it, or the directory cannot be written.
    """
    path, owner, made = directory / LOCK_FILE, Owner(), not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, owner, used, remedy)
    except OSError as error:
        if made:
            _remove_empty(directory)
        raise ConfigError(f"cannot write the directory {directory}: {error}") from error
    _descriptors.add(descriptor)
    try:
        yield owner
    finally:
        with contextlib.suppress(OSError):
            if _is_file(descriptor, path):
                path.unlink()
        _descriptors.discard(descriptor)
        os.close(descriptor)
        if made:
            _remove_empty(directory)


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # there are results in it
        directory.rmdir()


def _acquire(path: Path, owner: Owner, used: str, remedy: str) -> int:
    """The open file, locked, with its owner in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, path, owner, used, remedy)
            if _is_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)
                os.fsync(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has just removed it: lock the one that is there now


def _flock(descriptor: int, path: Path, owner: Owner, used: str, remedy: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read(path)
        if error.errno not in _HELD:
            last = f". The last start was {holder.text}" if holder is not None else ""
            print(
                f"warning: the file system of {path} has no locks ({error.strerror}): nothing stops a second start of "
                f"this run, which would destroy its checkpoints{last}",
                flush=True,
            )
        elif holder is not None and owner.follows(holder):
            print(f"warning: taking {path} from an earlier start of this job, {holder.text}", flush=True)
            path.unlink(missing_ok=True)
        else:
            raise ConfigError(
                f"{used}: {holder.text if holder else 'unnamed'}. {remedy}. If its machine is gone, remove {path}"
            ) from error


def _require_seen(directory: Path, owner: Owner, there: Path) -> None:
    """Raise ConfigError unless this process finds what rank 0 wrote."""
    deadline = time.monotonic() + SEEN_SECONDS
    while _read(directory / LOCK_FILE) != owner:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"does not see what rank 0 on {owner.host} writes to {there}, in {directory.resolve()}: each would "
                "keep a part of every checkpoint. Give an output_dir on a file system that all processes see, by its "
                "absolute path"
            )
        time.sleep(POLL_SECONDS)


def _read(path: Path) -> Owner | None:
    """Who stands in the file, if that can be read."""
    try:
        return Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _forget() -> None:
    """In a forked process: only the one that took a lock holds it, or it would outlive that."""
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_forget)
