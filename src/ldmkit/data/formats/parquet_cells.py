"""Random access to the pictures in parquet files.

Parquet is compressed in pages that are read front to back, so a single cell costs the way to it. What
was read on that way is kept, up to a limit, for each process: reading in order, or at random within
row groups that fit, reads each byte once, and memory does not grow with the file.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from ldmkit.data.items import MAX_BYTES
from ldmkit.errors import DataError

OPEN_GROUPS = 4
"""Row groups kept for each process."""
GROUP_BYTES = 64 << 20
"""Picture bytes kept of each."""
BATCH_BYTES = 8 << 20
"""Picture bytes read at once, about."""
BUFFER = 1 << 20
"""Bytes of a file read at once; without it a column of a row group is read as a whole."""


class ParquetCell(NamedTuple):
    """A picture in one cell of a parquet file (an `items.Blob`)."""

    file: str
    group: int
    """Row group."""
    row: int
    """In its row group, from 0."""
    column: str
    """Dotted path of the column: `image.bytes` where it is a struct."""
    number: int
    """In the file, from 1; for people."""
    size: int
    """Bytes of the whole column in this row group, compressed: what changes when a cell does."""

    @property
    def name(self) -> str:
        """The file, row and column."""
        return f"{self.file}, row {self.number}, column {self.column}"

    def read(self) -> bytes:
        """The picture file.

        Raises:
            DataError: the file is damaged or has changed since it was listed, or the cell is empty.
        """
        with parquet_errors(self.file), _ONE_AT_A_TIME:
            value = _group_of(self).cell(self.row)
        if isinstance(value, dict):
            value = value.get(self.column.rpartition(".")[2])
        if not value:
            raise DataError(
                f"{self.name} holds no picture; store the bytes of each picture in the file"
            )
        if len(value) > MAX_BYTES:
            raise DataError(f"{self.name} has {len(value):,} bytes; at most {MAX_BYTES:,} are read")
        return value


class OpenGroup:
    """One column of a row group that is read front to back, and the last of it in memory."""

    def __init__(self, cell: ParquetCell) -> None:
        self.file = open_parquet(cell.file)
        layout = self.file.metadata
        if cell.group >= layout.num_row_groups or self._size(cell) != cell.size:
            raise DataError(f"{cell.file} has changed since it was listed; run the command again")
        self.path, self.group, self.column = cell.file, cell.group, cell.column
        self.rows = layout.row_group(cell.group).num_rows
        of_all = chunk_of(self.file, cell.group, cell.column).total_uncompressed_size
        self.batch_size = max(1, min(self.rows, BATCH_BYTES * self.rows // max(of_all, 1)))
        self._restart()

    def cell(self, row: int) -> Any:  # noqa: ANN401 - as the column's type has it
        """The value in a row, counted from 0."""
        number = row // self.batch_size
        if number < self.next and number not in self.kept:
            self._restart()
        while self.next <= number:
            self._read_on()
        return self.kept[number][row % self.batch_size].as_py()

    def _size(self, cell: ParquetCell) -> int | None:
        chunk = chunk_of(self.file, cell.group, cell.column)
        return chunk.total_compressed_size if chunk else None

    def _restart(self) -> None:
        self.batches = self.file.iter_batches(
            self.batch_size, row_groups=[self.group], columns=[self.column], use_threads=False
        )
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.next = 0

    def _read_on(self) -> None:
        batch = next(self.batches, None)
        if batch is None:
            raise DataError(f"{self.path} has fewer rows than it says; copy it again")
        self.kept[self.next] = batch.column(0)
        self.next += 1
        while len(self.kept) > 1 and sum(part.nbytes for part in self.kept.values()) > GROUP_BYTES:
            self.kept.popitem(last=False)


def open_parquet(path: str) -> Any:  # noqa: ANN401 - a pyarrow.parquet.ParquetFile
    """Open a parquet file so that columns are read in small parts.

    Raises:
        DataError: pyarrow is missing.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} is read with pyarrow: pip install 'ldmkit[parquet]'") from error
    return pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)


@contextlib.contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Turn what pyarrow raises into one sentence.

    Raises:
        DataError: instead of its errors.
    """
    try:
        yield
    except OSError as error:  # pyarrow says so of damaged pages, too
        reason = error.strerror or _first_line(error)
        raise DataError(f"cannot read {path}: {reason}; copy it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} holds text that is not UTF-8; write it anew") from error
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        raise DataError(
            f"{path} is not a whole parquet file ({_first_line(error)}); copy it again"
        ) from error


def chunk_of(file: Any, group: int, column: str) -> Any:  # noqa: ANN401
    """The metadata of one column of a row group; None without such a column."""
    layout = file.metadata.row_group(group)
    for place in range(layout.num_columns):
        chunk = layout.column(place)
        if chunk.path_in_schema == column:
            return chunk
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _group_of(cell: ParquetCell) -> OpenGroup:
    # A child of this process must not go on with the handles of its parent.
    key = (os.getpid(), cell.file, cell.group, cell.column, cell.size)
    if key not in _OPEN:
        _OPEN[key] = OpenGroup(cell)
        while len(_OPEN) > OPEN_GROUPS:
            _OPEN.popitem(last=False)
    _OPEN.move_to_end(key)
    return _OPEN[key]


_OPEN: OrderedDict[tuple[int, str, int, str, int], OpenGroup] = OrderedDict()
"""The row groups that were read last."""
_ONE_AT_A_TIME = threading.Lock()
"""A row group has one place up to which it is read."""
