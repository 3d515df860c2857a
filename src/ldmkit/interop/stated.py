"""What is typed and what a source says of itself: they agree, or the user hears of it."""

from collections.abc import Sequence
from typing import TypeVar

from ldmkit.errors import UsageError
from ldmkit.interchange_configs import ImportConfig

Value = TypeVar("Value", str, int, float)
CLOSE = 1e-3
"""Share within which two numbers are the same, one of them typed."""


def agreed(typed: Value | None, stated: Value | None, option: str, source: str) -> Value | None:
    """What is stated, else what is typed; None where neither is.

    Raises:
        UsageError: the two contradict each other.
    """
    if typed is None or stated is None:
        return typed if stated is None else stated
    if isinstance(typed, float) and isinstance(stated, float):
        same = abs(typed - stated) <= CLOSE * abs(stated)
    else:
        same = typed == stated
    if not same:
        said = f"{stated:.6g}" if isinstance(stated, float) else stated
        raise UsageError(f"{option} {typed}: {source} says {said}; leave it out")
    return stated


def require_unused(config: ImportConfig, options: Sequence[str], why: str) -> None:
    """Refuse options that mean nothing for a source.

    Args:
        config: what was typed.
        options: names of its fields.
        why: what the source is or lacks.

    Raises:
        UsageError: one of them was given.
    """
    defaults = type(config).model_fields
    given = [name for name in options if getattr(config, name) != defaults[name].default]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} means nothing here: {why}")
