"""How a run ends before its time."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names step, place and cause, and what to do; no traceback is needed."""
