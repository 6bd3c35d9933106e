"""Columns of a table in a text file: .csv, .tsv or JSON lines.

A .tsv has a tab between columns, and quotes in it mean nothing (GLUE's files, IANA's text/tab-separated-values); a
.csv has commas, and quotes around what holds commas or line ends.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from s2moe.data.errors import CorpusError
from s2moe.data.text_lines import lines_of

JSON_LINES = (".jsonl", ".jsonlines", ".ndjson", ".json")
TABLES = (".csv", ".tsv", *JSON_LINES)

Row = tuple[int, list[str]]  # the line it ends on, and its cells


def read_columns(content: str, where: str, *wanted: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The line and the wanted cells of each row of a table.

    Args:
        where: the file's path, whose end says what it is.
        wanted: for each column the names that it may have, in lower case.

    Raises:
        CorpusError: a column is not there, or a line does not fit.
    """
    if PurePosixPath(where).suffix.lower() in JSON_LINES:
        for number, values in json_lines(content, where):
            yield number, tuple(_field(values, names, f"{where}, line {number}") for names in wanted)
        return
    rows = _csv(content, where) if where.lower().endswith(".csv") else _tsv(content)
    header = [name.strip().lower() for name in next(rows, (0, []))[1]]
    places = [next((i for i, name in enumerate(header) if name in names), -1) for names in wanted]
    if -1 in places:
        columns = " and ".join(names[0] for names in wanted)
        raise CorpusError(f"{where}: expected a first line with the columns {columns}, got {header}")
    for number, cells in rows:
        if len(cells) != len(header):
            shown = repr("\t".join(cells)[:60])
            raise CorpusError(f"{where}, line {number}: expected {len(header)} columns, got {len(cells)}: {shown}")
        yield number, tuple(cells[place] for place in places)


def json_lines(content: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the object of each line that is not blank."""
    for number, line in enumerate(lines_of(content), 1):
        if line.strip():
            yield number, json_object(line, f"{where}, line {number}")


def json_object(line: str | bytes, where: str) -> dict[str, Any]:
    """The object that a line holds.

    Raises:
        CorpusError: it holds none.
    """
    try:
        found = json.loads(line)
    except RecursionError:
        raise CorpusError(f"{where}: its brackets are nested too deep; take that line out") from None
    except ValueError as error:
        raise CorpusError(f"{where} is not a JSON object on one line ({error}); give one object a line") from error
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(found), "a number or truth value")
        raise CorpusError(f'{where}: {kind} instead of an object such as {{"text": "..."}}; give one object a line')
    return found


def _csv(content: str, where: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        yield from ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise CorpusError(f"{where}, line {reader.line_num}: not a line of a .csv ({error})") from error


def _tsv(content: str) -> Iterator[Row]:
    return ((number, line.split("\t")) for number, line in enumerate(lines_of(content), 1) if line)


def _field(values: dict[str, Any], names: Sequence[str], where: str) -> str:
    name = next((name for name in values if name.strip().lower() in names), None)
    if name is None:
        raise CorpusError(f"{where}: no field {names[0]!r}, its fields are {', '.join(values) or 'none'}")
    value = values[name]
    if not isinstance(value, str | int):
        raise CorpusError(f"{where}: the field {name!r} must be a text, got {str(value)[:40]}")
    return str(value)
