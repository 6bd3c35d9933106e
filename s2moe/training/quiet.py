"""Keep other libraries' chatter out of a run's output."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within it, transformers saves and loads without progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def no_prints() -> contextlib.AbstractContextManager[object]:
    """Within it, nothing reaches standard output: DeepSpeed reports memory and its own steps by bare print."""
    return contextlib.redirect_stdout(io.StringIO())
