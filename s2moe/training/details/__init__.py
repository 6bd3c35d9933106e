"""A report on a finished vision run: `launcher/train_vision.py --report RUN`."""

from .report import REPORT_DIRECTORY, REPORT_TEXT, is_reported, report_on

__all__ = ["REPORT_DIRECTORY", "REPORT_TEXT", "is_reported", "report_on"]
