"""A run's memory of having been set back to an earlier state, once.

`RUN/setback.json` says to which step and why. It is written after the later checkpoints are gone, so
that a process killed in between goes on from the same state and meets the same trouble again.
"""

import json
from pathlib import Path

from ldmkit.durable import write_text
from ldmkit.facts import validated
from ldmkit.fields import Config

FILE = "setback.json"


class Setback(Config):
    """To which step a run was set back, from where and why."""

    step: int
    failed: int
    reason: str


def read_setback(run: Path) -> Setback | None:
    """The run's setback, if it had one.

    Raises:
        DataError: the file is not what ldmkit wrote.
    """
    path = run / FILE
    return (
        validated(Setback, json.loads(path.read_text(encoding="utf-8")), str(path))
        if path.exists()
        else None
    )


def write_setback(run: Path, setback: Setback) -> None:
    """Keep it, in one piece."""
    write_text(run / FILE, setback.model_dump_json())
