"""Before the first step: every process of a run can start, and has the same settings."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

from s2moe.config.options import ConfigError
from s2moe.data import CorpusError

from .checkpoint import TrainingState
from .processes import Processes
from .ranks import from_first, gather

NAMED = 5  # differences, or processes, that a message names at most
# Settings that what is trained does not depend on, where it goes on.
UNTOUCHED = ("logging.", "checkpoint.", "profile.", "init.")
ALIKE = ("world_size", "corpus", "tokenizer", "versions", "config")  # of the state, on all processes


@contextlib.contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Within it, an error of one process is raised on all, as a ConfigError that names it. Collective at the end.

    Otherwise the others would wait for it, and only its own output would say why.
    """
    mine: ConfigError | CorpusError | None = None
    try:
        yield
    except (ConfigError, CorpusError) as error:
        mine = error
    except OSError as error:
        mine = ConfigError(str(error))
    if processes.world_size == 1:
        if mine is not None:
            raise mine
        return
    errors = gather(None if mine is None else (socket.gethostname(), str(mine)))
    failed = {rank: error for rank, error in enumerate(errors) if error is not None}
    if not failed:
        return
    if mine is not None and len(failed) == len(errors) and len({text for _, text in failed.values()}) == 1:
        raise mine  # the same everywhere: no process needs naming
    told = [f"rank {rank} on {host}: {text}" for rank, (host, text) in list(failed.items())[:NAMED]]
    more = len(failed) - NAMED
    raise ConfigError("; ".join(told) + (f"; and {more} more processes" if more > 0 else "")) from mine


def require_same_settings(state: TrainingState, processes: Processes) -> None:
    """Raise ConfigError on every process unless all have rank 0's settings, corpus and versions. Collective."""
    if processes.world_size == 1:
        return
    mine = {name: getattr(state, name) for name in ALIKE}
    ours, theirs = _flat(mine), _flat(from_first(mine))
    with together(processes):
        names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if names:
            changes = [f"{name} is {ours.get(name)}, on rank 0 {theirs.get(name)}" for name in names[:NAMED]]
            raise ConfigError(
                f"was started otherwise than rank 0: {'; '.join(changes)}. "
                "Start all processes with the same command, code, data and environment"
            )


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> str:
    """For the user: in what the settings of a run that goes on differ from those of its checkpoint; empty if nowhere.

    Args:
        before: as a checkpoint's manifest has them.
    """
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    return ", ".join(
        f"{name} {_shown(old, name)} -> {_shown(new, name)}"
        for name in sorted({*old, *new})
        if not name.startswith(UNTOUCHED) and (name in old, old.get(name)) != (name in new, new.get(name))
    )


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "(none)"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, those of the run's configuration as they are written."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, "" if name == "config" else f"{name}.")
        else:
            flat[name] = value
    return flat
