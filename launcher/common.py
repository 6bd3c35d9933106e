"""What the entry points share: they run from any directory, and a user's error is one line, not a traceback."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

USER_ERROR, RUN_FAILED, INTERRUPTED = 2, 3, 130  # and s2moe.training's errors.LOST, signals.STOPPED


def prepare_environment() -> None:
    """Make the package importable from a clone, and settle GPU or CPU. Call before importing s2moe."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and warn
    warnings.filterwarnings("ignore", category=FutureWarning)


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

    Errors that all processes raise alike are printed once a machine: by the process with local rank 0.
    """
    from s2moe.config import ConfigError
    from s2moe.data import CorpusError
    from s2moe.training.errors import LOST, LostProcessError, ProcessError, TrainingError

    try:
        yield
    except ProcessError as error:
        fail(f"error: {error}", USER_ERROR, everywhere=True)
    except (ConfigError, CorpusError) as error:
        fail(f"error: {error}", USER_ERROR)
    except LostProcessError as error:
        fail(f"error: {error}", LOST, everywhere=True)  # the process that speaks for its machine may be the lost one
    except TrainingError as error:
        fail(f"error: {error}", RUN_FAILED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def is_first_of_machine() -> bool:
    """Whether this process speaks for its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0


def fail(message: str, status: int, everywhere: bool = False) -> None:
    """Print `message` once a machine, or by every process, and end this process with `status`."""
    if everywhere or is_first_of_machine():
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        where = "" if rank == "0" else f"[rank {rank} on {socket.gethostname()}] "
        print(f"{where}{message}", file=sys.stderr, flush=True)
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process with `status`, at once: sys.exit may wait for processes that have already failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(main: Callable[[list[str]], None]) -> None:
    """Run an entry point's `main` on the command line."""
    with user_errors():
        quiet_libraries()
        main(sys.argv[1:])
