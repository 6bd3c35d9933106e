"""Models read from Hugging Face directories: whole, or not at all.

transformers draws weights that a directory lacks at random and goes on. Here every weight must be there, of the right
size, and none left over; and whatever is damaged ends in one line that names it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2moe.config.options import ConfigError

CONFIG_FILE = "config.json"
NAMED = 3  # weights that a message names; the others it counts


def read_model(cls: Any, directory: Path) -> Any:
    """The model in a directory, on the CPU, in evaluation mode, in the precision it was saved in.

    Args:
        cls: a class of model with `from_pretrained`, or one of transformers' Auto classes.

    Raises:
        ConfigError: it cannot be read, or weights are missing, left over or of another size.
    """
    require_config(directory)
    try:
        with _without_load_report():
            model, found = cls.from_pretrained(
                directory, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # files that are not what they should be end in errors of any kind
        raise unreadable(directory, error) from error
    others = [name for name, *_ in found["mismatched_keys"]]
    require_whole(str(directory), found["missing_keys"], found["unexpected_keys"], others)
    return model.eval()


def read_config(cls: Any, directory: Path) -> Any:
    """The configuration of the model in a directory as a `cls`. Raises ConfigError where it cannot be read."""
    require_config(directory)
    try:
        return cls.from_pretrained(directory)
    except Exception as error:
        raise unreadable(directory, error) from error


def require_config(directory: Path) -> dict[str, Any]:
    """What config.json says. Raises ConfigError where it says nothing of a model."""
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(directory, error) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it has no settings of a model. Export or download the model again")
    return values


def require_whole(
    what: str, missing: Iterable[str], unexpected: Iterable[str] = (), others: Iterable[str] = ()
) -> None:
    """Raise ConfigError, naming a few, unless there is no such weight.

    Args:
        what: the weights, for people.
        missing: those that the model has and the files have not.
        unexpected: those that only the files have.
        others: those that the files have in another size.
    """
    problems = [
        f"{problem} {named(names)}"
        for problem, names in (
            ("they lack", sorted(missing)),
            ("the model has no place for", sorted(unexpected)),
            ("of another size than the model's are", sorted(others)),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"the weights of {what} are not those of its configuration: {'; '.join(problems)}. Export or download the "
            f"model again, or put back its {CONFIG_FILE}"
        )


def named(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def unreadable(directory: Path, error: Exception) -> ConfigError:
    """The error for a directory of which something cannot be read, in one line."""
    reason = " ".join(str(error).split()) or "no reason given"
    return ConfigError(
        f"the model in {directory} cannot be read ({type(error).__name__}: {reason}): export or download it again"
    )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Within it, transformers prints no table of weights that do not fit: `require_whole` says it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
