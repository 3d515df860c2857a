"""Tables of any kind to rows: JSON lines, CSV and parquet. A bad row is named and passed over."""

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from ldmkit.data.formats.columns import require_unicode
from ldmkit.data.formats.parquet_cells import open_parquet, parquet_errors
from ldmkit.data.formats.sidecars import MAX_TEXT_BYTES
from ldmkit.data.items import Problem
from ldmkit.errors import DataError

EXAMPLES = {
    ".jsonl": 'a valid line is {"file_name": "a.png", "text": "a red circle", "label": "circle"}',
    ".csv": "a valid table begins with the lines `file_name,text` and `a.png,a red circle`",
    ".parquet": "a valid table has the columns file_name and text",
}
"""What to write instead."""


class Row(NamedTuple):
    """One row of a table."""

    where: str
    """The file and the line."""
    values: dict[str, Any]


class Table(NamedTuple):
    """A table in memory."""

    columns: list[str]
    """All that occur, in order."""
    rows: list[Row]
    metadata: dict[bytes, bytes]
    """Of a parquet schema."""


def read_table(path: Path, problems: list[Problem]) -> Table:
    """Read a `.jsonl`, `.csv` or `.parquet` table; bad rows become problems.

    Raises:
        DataError: it cannot be read, or it is no such table at all.
    """
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        rows = list(READERS[path.suffix](path, problems))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    columns = dict.fromkeys(name for row in rows for name in row.values)
    return Table(list(columns), rows, {})


def _jsonl(path: Path, problems: list[Problem]) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from read_jsonl(file, str(path), problems)


def read_jsonl(file: BufferedIOBase, source: str, problems: list[Problem]) -> Iterator[Row]:
    """Rows of JSON lines; bad ones become problems.

    Args:
        file: to read from.
        source: its name in messages.
        problems: is added to.

    Raises:
        DataError: a line is too long.
    """
    number = 0
    while line := file.readline(MAX_TEXT_BYTES + 1):
        number += 1
        where = f"{source}, line {number}"
        if len(line) > MAX_TEXT_BYTES:
            raise DataError(f"{where} is longer than 1 MiB; put one JSON object in each line")
        yield from _jsonl_row(where, line, problems)


def _jsonl_row(where: str, line: bytes, problems: list[Problem]) -> Iterator[Row]:
    try:
        text = line.removeprefix(BOM_UTF8).decode("utf-8").strip()
        if text:
            yield Row(where, _object(text))
    except UnicodeDecodeError:
        problems.append(Problem("bad line", where, f"{where} is not UTF-8; save it as UTF-8"))
    except (ValueError, RecursionError) as error:
        text = f"{where} is no JSON object ({error}); {EXAMPLES['.jsonl']}"
        problems.append(Problem("bad line", where, text))


def _object(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}")
    if "\\ud" in text.lower():  # perhaps half a character, which no later file could hold
        json.dumps(values, ensure_ascii=False).encode()
    return values


def _csv(path: Path, problems: list[Problem]) -> Iterator[Row]:
    # Bytes that are no UTF-8 come through as halves of characters, so that their line can be named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] = []
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{where} is no CSV ({error}); {EXAMPLES['.csv']}") from error
            if fields is None:
                return
            if not columns:
                columns = [name.strip() for name in fields]
                continue
            try:
                yield from _csv_row(where, columns, fields)
            except DataError as error:
                problems.append(Problem("bad line", where, str(error)))


def _csv_row(where: str, columns: list[str], fields: list[str]) -> Iterator[Row]:
    if not fields:  # an empty line
        return
    if len(fields) != len(columns):
        raise DataError(
            f"{where} has {len(fields)} fields and the first line {len(columns)}; "
            'put text that holds commas in quotes, as in a.png,"red, round"'
        )
    for field in fields:
        require_unicode(field, where)
    yield Row(where, dict(zip(columns, fields, strict=True)))


def _parquet(path: Path) -> Table:
    with parquet_errors(str(path)):
        table = open_parquet(str(path)).read(use_threads=False)
        rows = [
            Row(f"{path}, row {number}", values)
            for number, values in enumerate(table.to_pylist(), start=1)
        ]
        return Table(table.column_names, rows, dict(table.schema.metadata or {}))


READERS = {".jsonl": _jsonl, ".csv": _csv}
"""Suffix -> what reads the rows of such a text."""
