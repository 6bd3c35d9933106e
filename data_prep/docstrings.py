"""The docstrings of Python's standard library, read from its source files without importing any."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from s2moe.data.text_lines import lines_of

LONG_LINE = 50
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


def library_docstrings(root: Path | None = None) -> Iterator[str]:
    """Every docstring below ``root`` (default: the standard library), in order of path and line."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    for path in sorted(source_files(root), key=lambda file: file.relative_to(root).as_posix()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in string literals
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a template, or a file made to be wrong
        documented = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for node in sorted(documented, key=lambda node: getattr(node, "lineno", 0)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def source_files(root: Path) -> Iterator[Path]:
    """The library's own .py files, without its tests and whatever was installed into it."""
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in EXCLUDED]
        yield from (Path(directory, file) for file in files if file.endswith(".py"))


def honest(docstrings: Iterable[str], held_out: str) -> Iterator[str]:
    """Docstrings without exact repetitions and without any that shares a long line with ``held_out``.

    A line of at least 50 characters of the one that occurs anywhere in the other, white space aside, is a
    shared line.
    """
    held_out_text = squeeze(held_out)
    held_out_lines = set(long_lines(held_out))
    seen = set()
    for docstring in docstrings:
        if docstring in seen:
            continue
        seen.add(docstring)
        text = squeeze(docstring)
        shared = any(line in held_out_text for line in long_lines(docstring))
        if not shared and not any(line in text for line in held_out_lines):
            yield docstring


def long_lines(text: str) -> Iterator[str]:
    """The lines of at least 50 characters, white space squeezed."""
    return (line for line in map(squeeze, lines_of(text)) if len(line) >= LONG_LINE)


def squeeze(text: str) -> str:
    """Every run of white space as one space, none at the ends."""
    return " ".join(text.split())
