"""Parquet files with the pictures in them, as Hugging Face stores data sets: one, a folder, a pattern.

The picture column is a struct of `bytes` and `path`, or binary. Only the other columns are read when
the source is listed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from ldmkit.data.formats.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    caption_of,
    classes_of_sets,
    huggingface_classes,
    label_sets_of,
    pick_column,
    pick_label_columns,
    with_labels,
)
from ldmkit.data.formats.folder import files_below
from ldmkit.data.formats.parquet_cells import (
    ParquetCell,
    chunk_of,
    open_parquet,
    parquet_errors,
)
from ldmkit.data.formats.scalars import missing_columns, scalars_of
from ldmkit.data.formats.sidecars import EMPTY_CAPTION, suffix_of
from ldmkit.data.items import Item, Problem, Source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

PICTURE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "tif", "tiff", "npy")
ROWS_AT_ONCE = 4096


class Raw(NamedTuple):
    """One row, its labels not yet indices and its scalars not yet numbers."""

    key: str
    cell: ParquetCell
    caption: object
    labels: tuple[object, ...]
    scalars: dict[str, object]


class Columns(NamedTuple):
    """Which column is what; that of pictures as a dotted path."""

    picture: str
    caption: str | None
    labels: tuple[str, ...]
    """One for each label set."""
    scalars: tuple[str, ...]
    """Those of the scalars that this file has."""
    all: list[str]
    """Names of all columns."""


def scan_parquet(config: SourceConfig) -> Source:
    """List the pictures in parquet files, in the order of files and rows.

    A key is the name of the file below DATA, and the row in it, from 0.

    Raises:
        DataError: there is no such file.
    """
    problems: list[Problem] = []
    files = _files(config.data, problems)
    if not files:
        raise DataError(f"no parquet file in {config.data}")
    rows: list[Raw] = []
    names: list[list[str]] = [[] for _ in config.label_column or LABEL_COLUMNS]
    seen: dict[str, None] = {}
    for name, path in files.items():
        try:
            rows += _scan_file(name, path, config, names, seen)
        except DataError as error:
            problems.append(Problem("damaged parquet file", path, str(error), "fatal"))
    problems += missing_columns(config.scalars, seen, config.data)
    classes = classes_of_sets([row.labels for row in rows], names)
    items = []
    for row in rows:
        try:
            caption = caption_of(row.caption, row.cell.name)
            where = f"{row.cell.file}, row {row.cell.number}"
            scalars = scalars_of(row.scalars, config.scalars, where)
            item = Item(row.key, row.cell, caption=caption, scalars=scalars)
            items.append(with_labels(item, row.labels, classes, row.cell.name))
        except DataError as error:
            problems.append(Problem("bad row", row.cell.name, str(error)))
            continue
        if row.caption is not None and not caption:
            text = f"{row.cell.name}: the caption is empty"
            problems.append(Problem(EMPTY_CAPTION, row.key, text, "warning"))
    sets = label_sets_of(config.label_column, classes)
    return Source(items, classes[0].names, problems=tuple(problems), label_sets=sets)


def _scan_file(
    name: str, path: str, config: SourceConfig, names: list[list[str]], seen: dict[str, None]
) -> list[Raw]:
    """The rows of one file; the class names are those of the first file that has some.

    Args:
        name: of the file in keys.
        path: of the file.
        config: which columns to read.
        names: of the classes of each label set, added to.
        seen: names of all columns so far, added to.
    """
    with parquet_errors(path):
        file = open_parquet(path)
        columns = _columns(file.schema_arrow, path, config)
        seen.update(dict.fromkeys(columns.all))
        metadata = file.schema_arrow.metadata
        found = [huggingface_classes(metadata, column) for column in columns.labels]
        if any(old and new and old != new for old, new in zip(names, found, strict=False)):
            raise DataError(f"{path} has other class names than the files before it")
        rows = list(_rows(file, name, path, columns))
    for place, new in enumerate(found):
        names[place] = names[place] or new
    return rows


def _files(location: str, problems: list[Problem]) -> dict[str, str]:
    """Name below the location -> path."""
    if not Path(location).is_dir():
        paths = list(braceexpand(location)) if "{" in location else [location]
        root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
        return {os.path.relpath(path, root or "."): path for path in paths}
    names = sorted(name for name, _ in files_below(location, problems))
    return {name: f"{location}/{name}" for name in names if suffix_of(name) == "parquet"}


def _columns(schema: Any, path: str, config: SourceConfig) -> Columns:  # noqa: ANN401
    pictures = {field.name: _leaf(field) for field in schema if _leaf(field)}
    known = [name for name in PICTURE_COLUMNS if name in pictures]
    if not known and len(pictures) != 1:
        raise DataError(
            f"{path} has no column of pictures: one named {', '.join(PICTURE_COLUMNS)} that holds "
            f"the bytes of picture files is needed, and its columns are {', '.join(schema.names)}"
        )
    return Columns(
        pictures[(known or list(pictures))[0]],
        pick_column(schema.names, config.caption_column, CAPTION_COLUMNS, "--caption-column", path),
        pick_label_columns(schema.names, config.label_column, path),
        tuple(name for name in config.scalars or () if name in schema.names),
        list(schema.names),
    )


def _leaf(field: Any) -> str:  # noqa: ANN401
    """The dotted path of a field's bytes; "" where it holds none."""
    import pyarrow.types

    def is_bytes(kind: Any) -> bool:  # noqa: ANN401
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    if is_bytes(field.type):
        return field.name
    if pyarrow.types.is_struct(field.type):
        place = field.type.get_field_index("bytes")
        if place >= 0 and is_bytes(field.type.field(place).type):
            return f"{field.name}.bytes"
    return ""


def _rows(file: Any, name: str, path: str, columns: Columns) -> Iterator[Raw]:  # noqa: ANN401
    number = 0
    digits = len(str(file.metadata.num_rows))
    for group in range(file.metadata.num_row_groups):
        size = chunk_of(file, group, columns.picture).total_compressed_size
        for row, values in enumerate(_values(file, group, columns)):
            cell = ParquetCell(path, group, row, columns.picture, number + 1, size)
            caption = values.get(columns.caption) if columns.caption else None
            labels = tuple(values.get(column) for column in columns.labels)
            scalars = {column: values.get(column) for column in columns.scalars}
            yield Raw(f"{name}/{number:0{digits}d}", cell, caption, labels, scalars)
            number += 1


def _values(file: Any, group: int, columns: Columns) -> Iterator[dict[str, object]]:  # noqa: ANN401
    """Caption, labels and scalars of each row of a group, by column."""
    known = (columns.caption, *columns.labels, *columns.scalars)
    wanted = list(dict.fromkeys(name for name in known if name is not None))
    if not wanted:
        for _ in range(file.metadata.row_group(group).num_rows):
            yield {}
        return
    for batch in file.iter_batches(
        ROWS_AT_ONCE, row_groups=[group], columns=wanted, use_threads=False
    ):
        found = [batch.column(name).to_pylist() for name in wanted]
        for row in zip(*found, strict=True):
            yield dict(zip(wanted, row, strict=True))
