"""What can be wrong with data: the one exception of the data packages, and what damaged archives raise."""

import lzma
import struct
import tarfile
import zipfile
import zlib


class CorpusError(ValueError):
    """A corpus cannot be prepared, opened or read as asked. Its message names problem and remedy on one line."""


# What reading a damaged, cut, encrypted or unknown archive raises; OSError besides, which also says "no such file".
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,  # an encrypted zip; as NotImplementedError a way of packing that zipfile lacks
)
