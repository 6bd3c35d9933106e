r"""Text as data files hold it: UTF-8, perhaps with a byte order mark, in lines that end in \n or \r\n.

`str.splitlines` and `str.split` go further: they also cut at U+0085, U+2028, U+00A0, U+3000 and other characters that
occur inside sentences.
"""

from __future__ import annotations

import re

_WHITE = " \t\n\r\f\v"
_RUN = re.compile(f"[{_WHITE}]+")


def decode(content: bytes) -> str:
    """UTF-8 without its byte order mark.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return content.decode("utf-8-sig")


def lines_of(text: str) -> list[str]:
    r"""The lines without their ends; what follows the last \n is one, if there is anything."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def squeeze(text: str) -> str:
    """Every run of ASCII white space as one space, none at the ends."""
    return _RUN.sub(" ", text).strip(_WHITE)
