"""How a run ends before its time."""

from s2moe.config.options import ConfigError


class ProcessError(ConfigError):
    """A setting that is impossible for this process, though perhaps not for the others: each says so itself."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names step, place and cause, and what to do; no traceback is needed."""
