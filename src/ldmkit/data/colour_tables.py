"""Tables that say which class each colour of a label map stands for: JSON or CSV."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmkit.data.formats.sidecars import MAX_TEXT_BYTES
from ldmkit.data.formats.tables import Row, read_table
from ldmkit.data.items import Problem
from ldmkit.errors import DataError
from ldmkit.label_names import UNLABELLED, ClassColour, Colour

COLOUR_COLUMNS = ("colour", "color")
CHANNEL_COLUMNS = (("red", "green", "blue"), ("r", "g", "b"))
ID_COLUMNS = ("id", "class")
HEX = re.compile(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")
NUMBERS = re.compile(r"[(\[]?\s*(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})\s*[)\]]?")
VALID = (
    "a valid .csv begins with the lines `colour,id,name` and `#804080,0,road`, a valid .json is "
    '[{"colour": [128, 64, 128], "id": 0, "name": "road"}] or {"#804080": 0}'
)


def read_colour_table(path: Path) -> tuple[ClassColour, ...]:
    """The colours of label maps, in the order of the file.

    A colour is `#RRGGBB`, or three numbers from 0 to 255: in one column, or in red, green and blue. Several
    colours may mean one class. Class 255 means unknown.

    Raises:
        DataError: the file cannot be read, is no such table, or says two things of a colour or class.
    """
    problems: list[Problem] = []
    if path.suffix == ".json":
        rows = list(_json_rows(path))
    elif path.suffix == ".csv":
        rows = read_table(path, problems).rows
    else:
        raise DataError(f"{path} is no table of colours by its name: {VALID}")
    if problems:
        raise DataError(problems[0].text)
    if not rows:
        raise DataError(f"{path} has no colours; {VALID}")
    colours: dict[Colour, ClassColour] = {}
    names: dict[int, str] = {}
    for row in rows:
        one = _class_colour(row)
        other = colours.setdefault(one.colour, one)
        if other.id != one.id:
            raise DataError(
                f"{row.where}: the colour {one.colour} means the class {other.id} and {one.id}: keep one"
            )
        if one.id != UNLABELLED and names.setdefault(one.id, one.name) != one.name:
            raise DataError(
                f"{row.where}: the class {one.id} is called {names[one.id]!r} and {one.name!r}: keep one"
            )
    return tuple(colours.values())


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        data = path.read_bytes()
        table: Any = json.loads(data) if len(data) <= MAX_TEXT_BYTES else None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); {VALID}") from error
    if isinstance(table, dict):
        for colour, said in table.items():
            values = said if isinstance(said, dict) else {"id": said}
            yield Row(f"{path}, {colour[:20]}", {"colour": colour, **values})
    elif isinstance(table, list) and all(isinstance(one, dict) for one in table):
        for number, one in enumerate(table, start=1):
            yield Row(f"{path}, entry {number}", one)
    else:
        raise DataError(f"{path} is no table of colours; {VALID}")


def _class_colour(row: Row) -> ClassColour:
    values = row.values
    column = next((name for name in COLOUR_COLUMNS if name in values), None)
    apart = next((names for names in CHANNEL_COLUMNS if set(names) <= values.keys()), None)
    given = values[column] if column else [values[name] for name in apart] if apart else None
    number = next((values[name] for name in ID_COLUMNS if name in values), None)
    colour, class_id = _colour(given), _byte(number)
    if colour is None or class_id is None:
        what = "colour" if colour is None else "class id from 0 to 255"
        raise DataError(f"{row.where} has no {what}; {VALID}")
    name = values.get("name")
    return ClassColour(colour=colour, id=class_id, name="" if name is None else str(name).strip())


def _colour(given: object) -> Colour | None:
    """Red, green and blue; None where it is no colour."""
    parts: Any = given
    if isinstance(given, str):
        match = HEX.fullmatch(given.strip())
        if match is not None:
            return int(match[1], 16), int(match[2], 16), int(match[3], 16)
        match = NUMBERS.fullmatch(given.strip())
        parts = match.groups() if match else None
    if not isinstance(parts, list | tuple) or len(parts) != 3:
        return None
    red, green, blue = map(_byte, parts)
    return None if red is None or green is None or blue is None else (red, green, blue)


def _byte(given: object) -> int | None:
    """A whole number from 0 to 255, also as text; None for anything else."""
    if isinstance(given, str):
        text = given.strip()
        given = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else None
    if not isinstance(given, int) or isinstance(given, bool):
        return None
    return given if 0 <= given <= 255 else None
