"""The columns of a table of pictures: which one is meant, and what its values become."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ldmkit.data.items import NO_LABEL, Item
from ldmkit.errors import DataError
from ldmkit.label_names import LabelSet

CAPTION_COLUMNS = ("text", "caption", "prompt")
LABEL_COLUMNS = ("label",)
MAX_CLASSES = 1_000_000
CLOSE = 0.75
"""How alike a misspelt name is, as `difflib` counts: txet is 0.75 of text."""


class Classes(NamedTuple):
    """The class names of a source, and how its labels are read."""

    names: tuple[str, ...]
    places: dict[str, int]
    """Name -> class index."""
    numbered: bool
    """Whether a label that is a number is a class index, not a name."""


def pick_column(
    columns: Iterable[str], asked: str | None, known: Sequence[str], option: str, where: str
) -> str | None:
    """The column asked for, or the first of the known names that is there; None without any.

    Args:
        columns: of the table.
        asked: the name that was given with `option`, if any.
        known: names that are looked for without it.
        option: how the user names a column.
        where: how to call the table in errors.

    Raises:
        DataError: the column asked for is not there.
    """
    columns = list(columns)
    if asked is None:
        return next((name for name in known if name in columns), None)
    if asked not in columns:
        raise DataError(f"{where} has no column {asked} ({option}){nearest([asked], columns)}")
    return asked


def pick_label_columns(
    columns: Iterable[str], asked: Sequence[str] | None, where: str
) -> tuple[str, ...]:
    """The columns of labels, one for each label set; none where the table has no such column.

    Args:
        columns: of the table.
        asked: the names that were given with `--label-column`, if any.
        where: how to call the table in errors.

    Raises:
        DataError: a column asked for is not there.
    """
    columns = list(columns)
    found = (
        pick_column(columns, name, LABEL_COLUMNS, "--label-column", where)
        for name in asked or (None,)
    )
    return tuple(name for name in found if name is not None)


def classes_of_sets(
    rows: Sequence[Sequence[object]], names: Sequence[Sequence[str]]
) -> list[Classes]:
    """The classes of each label set; see `classes_of`.

    Args:
        rows: raw labels of each picture, one for each set.
        names: what the table itself says the classes of each set are called.
    """
    return [
        classes_of((row[place] for row in rows if row), known) for place, known in enumerate(names)
    ]


def with_labels(
    item: Item, values: Sequence[object], classes: Sequence[Classes], where: str
) -> Item:
    """An item with its class in each label set; see `label_of`.

    Args:
        item: the picture.
        values: raw labels, one for each set; nothing where its table has none.
        classes: of each set.
        where: how to call its row in errors.

    Raises:
        DataError: one is no class.
    """
    if not values:
        return item
    labels = tuple(label_of(*pair, where) for pair in zip(values, classes, strict=True))
    return item._replace(label=labels[0], labels=labels if len(labels) > 1 else ())


def label_sets_of(asked: Sequence[str] | None, classes: Sequence[Classes]) -> tuple[LabelSet, ...]:
    """The label sets by name, where several were asked for; else none."""
    if asked is None or len(asked) < 2:
        return ()
    return tuple(LabelSet(name=n, classes=c.names) for n, c in zip(asked, classes, strict=True))


def misspelt(columns: Iterable[str], wanted: Iterable[str]) -> tuple[str, str] | None:
    """(found, meant) where a column looks like a wanted one that is not there, else None."""
    columns = list(columns)
    for name in wanted:
        close = difflib.get_close_matches(name, columns, n=1, cutoff=CLOSE)
        if close and close[0] != name:
            return close[0], name
    return None


def nearest(wanted: Iterable[str], columns: Iterable[str]) -> str:
    """The end of a sentence on a missing column: the nearest name, or all there are."""
    columns = list(columns)
    found = misspelt(columns, wanted)
    if found is not None:
        return f"; did you mean {found[0]}?"
    return f"; its columns are {', '.join(columns[:20]) or 'none'}"


def caption_of(value: object, where: str) -> str:
    """A caption, or one in each line where the table lists several.

    Raises:
        DataError: it is no text.
    """
    if value is None:
        return ""
    texts: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise DataError(f"{where}: the caption {_short(text)} is no text")
        require_unicode(text, where)
        texts.append(text)
    return "\n".join(text.strip() for text in texts if text.strip())


def require_unicode(text: str, where: str) -> None:
    """Check that a text can be written as UTF-8.

    Raises:
        DataError: it holds halves of characters, or bytes that were no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not UTF-8; save it as UTF-8") from error


def classes_of(labels: Iterable[object], names: Sequence[str] = ()) -> Classes:
    """The classes that labels name: those of the table, else their numbers, else their words.

    Where some labels are numbers and others words, the more frequent kind counts.

    Args:
        labels: raw values; None and "" are no label.
        names: what the table itself says they are called.
    """
    if names:
        return Classes(tuple(names), {name: place for place, name in enumerate(names)}, True)
    plain = [label for label in labels if not _is_none(label)]
    numbers = [number for number in map(_number, plain) if number is not None]
    numbered = 2 * len(numbers) >= len(plain)
    if numbered:
        largest = max((number for number in numbers if number < MAX_CLASSES), default=NO_LABEL)
        found = tuple(str(number) for number in range(largest + 1))
    else:
        found = tuple(sorted({label for label in plain if isinstance(label, str)}))
    return Classes(found, {name: place for place, name in enumerate(found)}, numbered)


def label_of(value: object, classes: Classes, where: str) -> int:
    """The class index of a raw label; -1 for None, "" and -1.

    Raises:
        DataError: it is no class.
    """
    if _is_none(value):
        return NO_LABEL
    if isinstance(value, str) and value in classes.places:
        return classes.places[value]
    number = _number(value)
    if number is not None and classes.numbered and NO_LABEL <= number < len(classes.names):
        return number
    shown = ", ".join(classes.names[:5]) + (" ..." if len(classes.names) > 5 else "")
    raise DataError(
        f"{where}: the label {_short(value)} is none of the classes {shown or '(none)'}"
    )


def huggingface_classes(metadata: Mapping[bytes, bytes] | None, column: str | None) -> list[str]:
    """The names of a ClassLabel column, as the `datasets` library writes them into a parquet schema.

    Args:
        metadata: of the schema.
        column: of the labels.
    """
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[column]["names"]
    except (ValueError, LookupError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _is_none(value: object) -> bool:
    """Whether it means "no label", which pandas writes as NaN."""
    return value is None or value == "" or value != value


def _number(label: object) -> int | None:
    """The number that a label is, also as text or as 3.0."""
    if isinstance(label, str):
        is_number = label.removeprefix("-").isdecimal() and len(label) < 10
        return int(label) if is_number else None
    if isinstance(label, float):
        return int(label) if label.is_integer() else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
