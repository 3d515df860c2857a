"""Numbers that go along with pictures (age, dose): from the columns of a table, or from JSON."""

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

import numpy as np

from ldmkit.data.formats.columns import nearest
from ldmkit.data.items import Problem
from ldmkit.errors import DataError

LARGEST = float(np.finfo(np.float32).max)
"""Numbers are stored as float32."""


def scalars_of(
    values: Mapping[str, object], names: Sequence[str] | None, where: str
) -> tuple[float, ...]:
    """The numbers of one picture; NaN where one is missing, null, empty or NaN itself.

    Args:
        values: of its row, by column.
        names: of the columns asked for, None for none.
        where: how to call the row in errors.

    Raises:
        DataError: a value is no number, or none that float32 can hold.
    """
    return tuple(_number(values.get(name), f"{where}: {name}") for name in names or ())


def missing_columns(
    names: Sequence[str] | None, columns: Iterable[str], where: str
) -> list[Problem]:
    """A fatal problem for each scalar that is not even a column.

    Args:
        names: of the columns asked for, None for none.
        columns: all that occur in the source.
        where: how to call the source.
    """
    columns = list(dict.fromkeys(columns))
    texts = [
        f"{where} has no column {name} (--scalars){nearest([name], columns)}"
        for name in names or ()
        if name not in columns
    ]
    return [Problem("no such column", where, text, "fatal") for text in texts]


def _number(value: object, where: str) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    number = _as_float(value)
    if number is None:
        raise DataError(
            f"{where} is {str(value)[:40]!r}, which is no number; leave it empty if not known"
        )
    if abs(number) > LARGEST:  # which NaN is not
        raise DataError(
            f"{where} is {str(value)[:40]}, more than float32 holds; give it in another unit"
        )
    return number


def _as_float(value: object) -> float | None:
    """None for what is no number; a date such as 2024_01 is none, though Python takes it for one."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None
