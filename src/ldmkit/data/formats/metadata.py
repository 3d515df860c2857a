"""Hugging Face imagefolder: pictures, and a table metadata.jsonl, .csv or .parquet that describes them.

A table may lie in any folder (train/, test/); `file_name`, or one column `*_file_name`, is relative to
it. Captions, labels and boxes come from its columns; NAME.mask.png beside a picture is its mask.
"""

import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldmkit.data.formats.boxes import box_in_shares, pixel_size
from ldmkit.data.formats.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    Classes,
    caption_of,
    classes_of,
    classes_of_sets,
    huggingface_classes,
    label_of,
    label_sets_of,
    misspelt,
    nearest,
    pick_column,
    pick_label_columns,
    require_unicode,
    with_labels,
)
from ldmkit.data.formats.folder import files_below
from ldmkit.data.formats.scalars import missing_columns, scalars_of
from ldmkit.data.formats.sidecars import EMPTY_CAPTION, IMAGE_SUFFIXES, MASK, suffix_of
from ldmkit.data.formats.tables import EXAMPLES, Row, Table, read_table
from ldmkit.data.items import NO_LABEL, Box, Item, Problem, Source, Span
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
OBJECTS = "objects"


class Columns(NamedTuple):
    """Which column is what."""

    file_name: str
    caption: str | None
    labels: tuple[str, ...]
    """One for each label set."""
    scalars: tuple[str, ...]


class Line(NamedTuple):
    """What a table says of one picture, not yet checked against the files."""

    where: str
    key: str
    """Path of the picture below the data's root."""
    caption: str
    labels: tuple[object, ...]
    objects: object
    others: tuple[str, ...]
    """Paths in other `*_file_name` columns."""
    scalars: tuple[float, ...]


def scan_metadata(config: SourceConfig) -> Source:
    """List the pictures that the tables below a folder name, in the order of the lines.

    Raises:
        DataError: there is no such table.
    """
    root = config.data
    problems: list[Problem] = []
    sizes = dict(sorted(files_below(root, problems)))
    tables = [name for name in sizes if name.rpartition("/")[2] in TABLES]
    if not tables:
        raise DataError(f"no table in {root}: one of {', '.join(TABLES)} is needed")
    lines: list[Line] = []
    names: list[list[str]] = [[] for _ in config.label_column or LABEL_COLUMNS]
    seen: dict[str, None] = {}
    for name in tables:
        try:
            _require_one_table(root, name, tables)
            table = read_table(Path(root, name), problems)
            columns = _columns(table, f"{root}/{name}", config, problems)
            seen |= dict.fromkeys(table.columns)
            for place, column in enumerate(columns.labels):
                names[place] = names[place] or huggingface_classes(table.metadata, column)
            lines += _lines(table, columns, name, problems)
        except DataError as error:
            problems.append(Problem("bad table", f"{root}/{name}", str(error), "fatal"))
    problems += missing_columns(config.scalars, seen, root)
    classes = classes_of_sets([line.labels for line in lines], names)
    boxes = classes_of(_categories(lines))
    items: dict[str, Item] = {}
    for line in lines:
        try:
            _require_new(line, items)
            item = _item(line, root, sizes, boxes, problems)
            items[line.key] = with_labels(item, line.labels, classes, line.where)
        except DataError as error:
            problems.append(Problem(_kind(line, sizes, items), line.where, str(error)))
    _name_the_rest(root, sizes, lines, problems)
    return Source(
        list(items.values()),
        classes[0].names,
        boxes.names,
        tuple(problems),
        label_sets=label_sets_of(config.label_column, classes),
    )


def has_table(folder: Path) -> bool:
    """Whether such a table lies in a folder or in one of its folders."""
    folders = next(os.walk(folder), ("", [], []))[1]  # none where it cannot be read
    return any(
        os.access(folder / subfolder / name, os.F_OK)
        for subfolder in ("", *folders)
        for name in TABLES
    )


def _require_one_table(root: str, name: str, tables: list[str]) -> None:
    folder = name.rpartition("/")[0]
    twin = next(other for other in tables if other.rpartition("/")[0] == folder)
    if twin != name:
        raise DataError(f"{root}/{name} and {twin} describe the same folder; keep one of them")


def _columns(table: Table, where: str, config: SourceConfig, problems: list[Problem]) -> Columns:
    files = [name for name in table.columns if name.endswith(f"_{FILE_NAME}")]
    preferred = [name for name in (FILE_NAME, f"image_{FILE_NAME}") if name in table.columns]
    if not preferred and len(files) != 1:
        found = f"; it has {', '.join(files)}" if files else nearest([FILE_NAME], table.columns)
        first = table.rows[0].where if table.rows else where
        raise DataError(
            f"{first} has no column {FILE_NAME}{found}; {EXAMPLES[Path(where).suffix]} "
            "(to read the folder without its table: --format folder)"
        )
    caption = pick_column(
        table.columns, config.caption_column, CAPTION_COLUMNS, "--caption-column", where
    )
    labels = pick_label_columns(table.columns, config.label_column, where)
    for there, known, option in (
        (caption is not None, CAPTION_COLUMNS, "--caption-column"),
        (bool(labels), LABEL_COLUMNS, "--label-column"),
    ):
        close = None if there else misspelt(table.columns, known)
        if close is not None:
            text = f"{where} has a column {close[0]}, which is not read: did you mean {close[1]}?"
            text += f" Rename it, or give {option} {close[0]}"
            problems.append(Problem("unknown column", where, text, "warning"))
    return Columns((preferred or files)[0], caption, labels, config.scalars or ())


def _lines(table: Table, columns: Columns, name: str, problems: list[Problem]) -> list[Line]:
    folder, example = name.rpartition("/")[0], EXAMPLES[Path(name).suffix]
    lines = []
    for row in table.rows:
        try:
            line = _line(row, columns, folder, example)
        except DataError as error:
            problems.append(Problem("bad line", row.where, str(error)))
            continue
        lines.append(line)
        if columns.caption in row.values and not line.caption:
            text = f"{row.where}: the caption of {line.key} is empty"
            problems.append(Problem(EMPTY_CAPTION, line.key, text, "warning"))
    return lines


def _line(row: Row, columns: Columns, folder: str, example: str) -> Line:
    named = (columns.file_name, columns.caption, *columns.labels)
    used = [name for name in named if name is not None]
    missing = [name for name in used if name not in row.values]
    typo = misspelt([name for name in row.values if name not in used], missing)
    if typo is not None:
        raise DataError(
            f"{row.where} has no column {typo[1]}; did you mean {typo[1]} by {typo[0]}? {example}"
        )
    if columns.file_name in missing:
        near = nearest([columns.file_name], row.values)
        raise DataError(f"{row.where} has no column {columns.file_name}{near}; {example}")
    values = row.values
    others = [name for name in values if name.endswith(FILE_NAME) and name != columns.file_name]
    return Line(
        row.where,
        _key(values[columns.file_name], folder, f"{row.where}, column {columns.file_name}"),
        caption_of(
            values.get(columns.caption) if columns.caption else None,
            f"{row.where}, column {columns.caption}",
        ),
        tuple(values.get(name) for name in columns.labels),
        values.get(OBJECTS),
        tuple(
            _key(values[name], folder, f"{row.where}, column {name}")
            for name in others
            if values[name]
        ),
        scalars_of(values, columns.scalars, row.where),
    )


def _key(value: object, folder: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {str(value)[:40]!r} is no file name")
    require_unicode(value, where)
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{where}: {value[:200]} leads out of the folder of the table; "
            "give the path relative to it, without .."
        )
    return (PurePosixPath(folder) / path).as_posix()


def _require_new(line: Line, items: dict[str, Item]) -> None:
    if line.key in items:
        raise DataError(f"{line.where}: {line.key} comes twice; keep one line for each picture")


def _kind(line: Line, sizes: dict[str, int], items: dict[str, Item]) -> str:
    if line.key in items:
        return "duplicate key"
    return "bad line" if line.key in sizes else "line without a picture"


def _item(
    line: Line,
    root: str,
    sizes: dict[str, int],
    boxes: Classes,
    problems: list[Problem],
) -> Item:
    if line.key not in sizes:
        raise DataError(
            f"{line.where}: there is no {root}/{line.key}; remove the line or add the file"
        )
    if suffix_of(line.key) not in IMAGE_SUFFIXES:
        raise DataError(f"{line.where}: {line.key} is no picture by its name")
    picture = Span(f"{root}/{line.key}", 0, sizes[line.key])
    mask = _mask(line.key)
    return Item(
        key=line.key,
        picture=picture,
        caption=line.caption,
        mask=Span(f"{root}/{mask}", 0, sizes[mask]) if mask in sizes else None,
        boxes=_boxes(line, picture, boxes, problems),
        scalars=line.scalars,
    )


def _boxes(line: Line, picture: Span, names: Classes, problems: list[Problem]) -> tuple[Box, ...]:
    if not line.objects:
        return ()
    boxes, categories = _objects(line)
    if not boxes:
        return ()
    size = pixel_size(picture)
    found = []
    for number, (bbox, category) in enumerate(zip(boxes, categories, strict=True), start=1):
        where = f"{line.where}, box {number}"
        index = label_of(category, names, where)
        if index == NO_LABEL:
            raise DataError(f"{where} has no category")
        found.append(box_in_shares(bbox, index, size, where, problems))
    return tuple(box for box in found if box is not None)


def _objects(line: Line) -> tuple[list[Any], list[Any]]:
    """Boxes and their categories, as many."""
    found = _box_lists(line.objects)
    if found is None or len(found[0]) != len(found[1]):
        raise DataError(
            f"{line.where}: {OBJECTS} does not list as many boxes as categories; a valid one is "
            '{"bbox": [[x, y, width, height]], "categories": [0]}'
        )
    return found


def _box_lists(objects: object) -> tuple[list[Any], list[Any]] | None:
    if not isinstance(objects, dict):
        return None
    boxes, categories = objects.get("bbox"), objects.get("categories", objects.get("category"))
    return (boxes, categories) if isinstance(boxes, list) and isinstance(categories, list) else None


def _categories(lines: list[Line]) -> list[Any]:
    """The categories of all boxes; lines whose boxes are bad are named later."""
    found = [_box_lists(line.objects) for line in lines]
    return [category for lists in found if lists is not None for category in lists[1]]


def _mask(key: str) -> str:
    return f"{key.rpartition('.')[0]}.{MASK}"


def _name_the_rest(
    root: str, sizes: dict[str, int], lines: list[Line], problems: list[Problem]
) -> None:
    named = {path for line in lines for path in (line.key, _mask(line.key), *line.others)}
    for name in sizes:
        if suffix_of(name) in IMAGE_SUFFIXES and name not in named:
            text = f"{root}/{name} stands in no table and is left out"
            problems.append(Problem("picture without a line", name, text, "warning"))
