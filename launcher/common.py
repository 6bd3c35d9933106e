"""What the entry points share: they run from any directory, and a user's error is one line, not a traceback."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from s2moe.training.processes import Processes
    from s2moe.training.run import Result

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as torch says it
USER_ERROR, RUN_FAILED, INTERRUPTED = 2, 3, 130  # and s2moe.training's errors.LOST, signals.STOPPED


def prepare_environment() -> None:
    """Make the package importable from a clone, and settle GPU or CPU. Call before importing s2moe."""
    sys.excepthook = _excepthook
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and warn
    warnings.filterwarnings("ignore", category=FutureWarning)


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while modules are imported, which takes a while, is no error to show the place of."""
    if issubclass(kind, KeyboardInterrupt):
        fail("interrupted: nothing had begun", INTERRUPTED)
    sys.__excepthook__(kind, error, trace)


def quiet_libraries() -> None:
    """Of DeepSpeed and transformers, show only warnings and errors; no progress bars but our own."""
    import logging

    from deepspeed.utils import logger
    from transformers.utils.logging import disable_progress_bar

    logger.setLevel(logging.WARNING)
    disable_progress_bar()


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that are the user's to mend into one message and an exit status.

    Errors that all processes raise alike are printed once a machine: by the process with local rank 0. A full disk is
    the failure of the run, whatever it had to be written for.
    """
    from s2moe.config import ConfigError
    from s2moe.data import CorpusError
    from s2moe.disk import disk_is_full, told_of_disk
    from s2moe.output import flush_output
    from s2moe.training.errors import LOST, LostProcessError, ProcessError, TrainingError

    try:
        try:
            yield
        except SystemExit:  # after --help
            flush_output()
            raise
        flush_output()  # what cannot be printed is found here, not after Python's end
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except LostProcessError as error:
        fail(f"error: {error}", LOST, everywhere=True)  # the process that speaks for its machine may be the lost one
    except TrainingError as error:
        fail(f"error: {error}", RUN_FAILED)
    except Exception as error:
        if disk_is_full(error):
            fail(f"error: {told_of_disk(error)}: make room, and start it again", RUN_FAILED, everywhere=True)
        if isinstance(error, ProcessError):
            fail(f"error: {error}", USER_ERROR, everywhere=True)
        if isinstance(error, (ConfigError, CorpusError)):
            message = re.sub(r"\s*\n\s*", " ", str(error))  # those of YAML have several lines
            fail(f"error: {message}", USER_ERROR)
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            told = str(error).splitlines()[0] if str(error) else "no memory is left"
            remedy = "take smaller micro-batches or a smaller model; pretrain.py --dry-run says what a run needs"
            fail(f"error: out of memory: {told}: {remedy}", USER_ERROR, everywhere=True)
        raise


def is_first_of_machine() -> bool:
    """Whether this process speaks for its machine."""
    text = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return not text.strip().isdecimal() or int(text) == 0  # what is no number is an error, which has to be said


def fail(message: str, status: int, everywhere: bool = False) -> None:
    """Print `message` once a machine, or by every process, and end this process with `status`."""
    if everywhere or is_first_of_machine():
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        where = "" if rank == "0" else f"[rank {rank} on {socket.gethostname()}] "
        print(f"{where}{message}", file=sys.stderr, flush=True)
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process with `status`, at once: sys.exit may wait for processes that have already failed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # a closed one is None
            stream.flush()
    os._exit(status)


class Parser(argparse.ArgumentParser):
    """One line for an error, said once a machine. What is not an option of an entry point is a setting.

    An option that changes nothing without another one is refused where that is missing, see `needs`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._needs: dict[str, str] = {}

    def needs(self, partners: str, *names: str) -> None:
        """The options called `names` matter only with `partners`, a condition on options as `s2moe.options.holds` has.

        All are given as the parsed arguments are called, such as `world_size`.
        """
        self._needs |= dict.fromkeys(names, partners)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, rest = super().parse_known_args(args, namespace)
        if self._needs:
            self._check_needs(options)
        return options, rest

    def _check_needs(self, options: argparse.Namespace) -> None:
        from s2moe.options import holds

        def value_of(name: str) -> Any:
            return getattr(options, name)

        for name, partners in self._needs.items():
            if value_of(name) != self.get_default(name) and not holds(partners, value_of):
                told = " or ".join(_condition(partner, value_of) for partner in partners.split(" or "))
                told = told.replace(" or with ", " or ")
                self.error(f"{_flag(name)} goes {told}")

    def error(self, message: str) -> NoReturn:
        if is_first_of_machine():
            print(f"error: {message} (--help explains)", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR)  # nothing has been started that it could wait for


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _condition(partner: str, value_of: Callable[[str], Any]) -> str:
    if partner.startswith("not "):
        return f"without {_flag(partner[4:])}"
    name, _, values = partner.partition("=")
    value = value_of(name)
    here = "" if value in (None, False, []) else f", which is {value}"
    return f"with {_flag(name)}{' ' if values else ''}{values.replace('|', ' or ')}{here}"


def run_parser() -> Parser:
    """The options that the entry points of a run have in common."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--local_rank", "--local-rank", type=int)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*")
    return parser


def train_and_report(
    config: Any,
    check: Callable[[], object],
    train: Callable[[Any, Processes], Result],
    report: Callable[[Any, Result], str],
) -> None:
    """Train in this process and its fellows, report, and end with the status of a run that a signal stopped.

    Args:
        check: finds mistakes that should not wait for the other processes.
    """
    from s2moe.output import output_is_spare
    from s2moe.training.processes import start_processes, stop_processes
    from s2moe.training.signals import STOPPED, catch_stop_signals, stop_signal

    catch_stop_signals()
    output_is_spare()
    if is_first_of_machine():
        check()
    processes = start_processes(config.training.timeout_minutes)
    result = train(config, processes)
    stop_processes(together=result.signalled)
    if processes.is_main:
        if result.finished:
            print(result.note or report(config, result), flush=True)
        else:
            cause = f"stopped by {_name(stop_signal())}" if result.signalled else "time is up"
            print(result.timing)
            print(f"{cause} after step {result.state.step}; the same command continues")
            print(f"run directory: {result.directory}")
    if result.signalled:
        leave(STOPPED)


def _name(received: signal.Signals | None) -> str:
    return received.name if received is not None else "a signal to another process"


def run(main: Callable[[list[str]], None]) -> None:
    """Run an entry point's `main` on the command line."""
    from s2moe.disk import disk_is_full
    from s2moe.output import guard_output

    def of_thread(failed: Any) -> None:
        """TensorBoard's thread hands a full disk to the main one, which says it."""
        if failed.exc_value is None or not disk_is_full(failed.exc_value):
            threading.__excepthook__(failed)

    threading.excepthook = of_thread
    guard_output()
    with user_errors():
        quiet_libraries()
        main(sys.argv[1:])
