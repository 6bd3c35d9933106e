"""The one exception of the data packages; its message names the problem and the remedy on one line."""


class CorpusError(ValueError):
    """A corpus cannot be prepared, opened or read as asked."""
