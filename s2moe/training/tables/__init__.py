"""Published tables of vision results, trained anew: `launcher/train_vision.py --table`."""

from .runner import run_table
from .spec import list_tables

__all__ = ["list_tables", "run_table"]
