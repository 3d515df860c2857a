"""What every config is made of: the base class, and a field with its help in one call.

Imports no torch.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _rises(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError("LO must lie below HI")
    return pair


ValueRange = Annotated[tuple[Finite, Finite], AfterValidator(_rises)]
"""The values that become -1 and 1."""
NoiseRange = Annotated[tuple[Weight, Weight], AfterValidator(_rises)]
"""Noise levels, standard deviations of whitened latents; the upper one may be infinite."""

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Of durations, in seconds."""


def seconds(duration: str) -> float:
    """The seconds in `90s`, `45m`, `7.5h`, `2d` or `7:30:00`.

    Raises:
        ValueError: it is none of these.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", duration):
        return float(found[1]) * UNITS[found[2]]
    if found := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", duration):
        return 3600.0 * int(found[1]) + 60.0 * int(found[2]) + int(found[3])
    raise ValueError(f"{duration} is no duration: write 90s, 45m, 7.5h, 2d or 7:30:00")


def _lasts(duration: str) -> str:
    if not seconds(duration) > 0:
        raise ValueError("a duration is longer than nothing")
    return duration


Duration = Annotated[str, AfterValidator(_lasts)]
"""A time as a person writes it."""


def _names(value: Any) -> Any:  # noqa: ANN401 - checked by the field's own type afterwards
    """Names from a text with commas between them, or from a list of such texts."""
    if value is None:
        return None
    parts = [value] if isinstance(value, str) else value
    if not all(isinstance(part, str) for part in parts):
        return value
    return tuple(name.strip() for part in parts for name in part.split(","))


def _differ(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names is not None and (not all(names) or len(set(names)) < len(names)):
        raise ValueError("give names that differ, with commas between them")
    return names


Names = Annotated[tuple[str, ...] | None, BeforeValidator(_names), AfterValidator(_differ)]
"""NAME,NAME,...: names that differ."""


def listed(value: Any) -> Any:  # noqa: ANN401 - checked by the field's own type afterwards
    """One value where several may stand."""
    return (value,) if isinstance(value, int | str) else value


def field(default: Any, text: str, *, short: str = "") -> Any:  # noqa: ANN401 - as pydantic's Field
    """A field with its default, its help text and perhaps a one-letter option."""
    return Field(default, description=text, json_schema_extra={"short": short} if short else None)


def argument(text: str, default: Any = ...) -> Any:  # noqa: ANN401
    """A field that is a positional argument on the command line."""
    return Field(default, description=text, json_schema_extra={"argument": True})


class Config(BaseModel):
    """Base of all: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
