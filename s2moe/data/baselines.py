"""What general-purpose compressors make of a text: the bar for a language model's bits per byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable

XZ_SMALLEST_DICTIONARY = 1 << 26  # what preset 9 has
XZ_LARGEST_DICTIONARY = 3 << 29  # the format's limit


def compressor_bits(data: bytes, given: bytes) -> dict[str, dict[str, float]]:
    """Bits per byte of ``data`` by gzip -9, bzip2 -9 and xz -9e.

    Returns ``{"gzip": {"alone": ..., "given": ...}, "bzip2": ..., "xz": ...}``.
    "alone" compresses ``data`` itself; "given" is (compressed(given + data) - compressed(given)) * 8 /
    len(data), what ``data`` adds once the training text ``given`` is known. How much of that each can use
    differs: gzip looks back 32 kB and bzip2 sorts blocks of 900 kB, so they see only the end of a longer
    ``given``; xz gets a dictionary that holds all of it, up to 1.5 GiB, for eleven times that in memory.
    The figures are per byte: bits per character where the text is ASCII.
    """
    if not data:
        raise ValueError("there is nothing to compress: data is empty")
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda text: gzip.compress(text, 9, mtime=0),
        "bzip2": lambda text: bz2.compress(text, 9),
        "xz": lambda text: _xz(text, len(given) + len(data)),
    }
    bits = {}
    for name, compress in compressors.items():
        alone = len(compress(data))
        added = len(compress(given + data)) - len(compress(given))
        bits[name] = {"alone": 8 * alone / len(data), "given": 8 * added / len(data)}
    return bits


def _xz(text: bytes, reach: int) -> bytes:
    size = max(XZ_SMALLEST_DICTIONARY, min(reach, XZ_LARGEST_DICTIONARY))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters)
