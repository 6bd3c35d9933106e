"""How a run ends before its time."""

from s2moe.config.options import ConfigError

LOST = 4  # exit status of a process that lost another one, or waited too long


class ProcessError(ConfigError):
    """A setting that is impossible for this process, though perhaps not for the others: each says so itself."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names step, place and cause, and what to do; no traceback is needed."""


class LostProcessError(TrainingError):
    """Another process is gone, or does not go on. Started again, the run continues."""
