"""What single samples are told, in words: as options say it, or the lines of a file or a pipe."""

import json
from collections.abc import Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from ldmkit.condition_configs import ClassCondition
from ldmkit.conditioning.classes import all_in_turns, labels_in_turns
from ldmkit.configs import STREAM
from ldmkit.data.formats.tables import Row, read_jsonl, read_table
from ldmkit.data.items import Problem
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.seals import read_limited, read_within

MAX_BYTES = 1 << 30
"""Of a file of prompts or conditions."""
USUAL = 16
"""Samples, where nothing says how many."""
ALIASES = {"label": "class", "prompt": "text", "caption": "text", "boxes": "layout"}
"""Other names of columns."""
EMBEDDED = {"text": "embedded-text", "image": "embedded-image"}
"""What a user says -> the kind that a frozen tower reads it for."""
TABLES = (".jsonl", ".csv")
NESTED = ("layout", "scalars")
"""Kinds whose values are lists or objects."""


class Request(NamedTuple):
    """What one sample is told."""

    where: str
    """The option, or the file and line, that says so."""
    told: Mapping[str, Any]
    """By kind of condition."""


def requests_of(
    config: SampleConfig, model: DiffusionConfig, source: BufferedIOBase | None
) -> list[Request]:
    """What is asked for, by the model's kinds of condition, each sample's alone.

    Args:
        config: of the command.
        model: what it can be told.
        source: where lines come from if the config says `-`.

    Raises:
        UsageError: an option has no such value.
        DataError: a file cannot be read, or a line of it is not understood.
    """
    return [_understood(one, model) for one in _requests(config, model, source)]


def _requests(
    config: SampleConfig, model: DiffusionConfig, source: BufferedIOBase | None
) -> list[Request]:
    if config.prompts is not None:
        lines = _text_of(config.prompts, source).splitlines()
        name = _named(config.prompts)
        found = [
            Request(f"{name}, line {number}", {"text": line})
            for number, line in enumerate(lines, start=1)
        ]
    elif config.conditions is not None:
        found = [Request(row.where, _told(row)) for row in _rows_of(config.conditions, source)]
    else:
        return _typed(config, model)
    if not found:
        raise DataError(f"{_named(config.prompts or config.conditions or STREAM)} has no lines")
    return found


def _typed(config: SampleConfig, model: DiffusionConfig) -> list[Request]:
    """What options say; without any, all classes take turns."""
    told: dict[str, Sequence[Any]] = {}
    classes = _classes(model)
    if config.label:
        told["class"] = _labels(config.label, classes)
    if config.prompt:
        told["text"] = config.prompt
    if not told and classes is not None and classes.names:
        told["class"] = all_in_turns(classes, config.num or USUAL)
    count = max((len(values) for values in told.values()), default=1)
    names = {"class": "--label", "text": "--prompt"}
    return [
        Request(
            ", ".join(
                f"{names[kind]} {_shown(values[turn % len(values)])}"
                for kind, values in told.items()
            ),
            {kind: values[turn % len(values)] for kind, values in told.items()},
        )
        for turn in range(count)
    ]


def _labels(labels: tuple[str, ...], classes: ClassCondition | None) -> Sequence[Any]:
    if classes is None:
        return labels
    try:
        return labels_in_turns(labels, classes)
    except ValueError as error:
        raise UsageError(f"--label {' --label '.join(labels)}: {error}") from error


def _shown(value: Any) -> str:  # noqa: ANN401 - any value
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join(f"{name}={one}" for name, one in value.items())


def _classes(model: DiffusionConfig) -> ClassCondition | None:
    return next((one for one in model.conditions if isinstance(one, ClassCondition)), None)


def _rows_of(path: Path, source: BufferedIOBase | None) -> list[Row]:
    problems: list[Problem] = []
    if path == STREAM:
        rows = list(read_jsonl(_stream(source), _named(path), problems))
    elif path.suffix in TABLES:
        rows = read_table(path, problems).rows
    else:
        raise UsageError(f"--conditions {path}: name a file of {' or '.join(TABLES)}")
    if problems:
        raise DataError(problems[0].text)
    return rows


def _told(row: Row) -> dict[str, Any]:
    """What a row speaks of, by column; what is empty says nothing."""
    return {name: value for name, value in row.values.items() if value not in ("", None)}


def _text_of(path: Path, source: BufferedIOBase | None) -> str:
    try:
        if path == STREAM:
            data = read_within(_stream(source), MAX_BYTES, _named(path))
        else:
            data = read_limited(path, MAX_BYTES)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{_named(path)} is not UTF-8; save it as UTF-8") from error


def _stream(source: BufferedIOBase | None) -> BufferedIOBase:
    if source is None:
        raise UsageError("lines are to come from `-`, and no stream was given to read from")
    return source


def _named(path: Path) -> str:
    return "standard input" if path == STREAM else str(path)


def _understood(request: Request, model: DiffusionConfig) -> Request:
    """What is told, by the model's kinds of condition.

    Text is text and a picture a picture for the user, whichever way the model reads it; a column may be
    a scalar's or a label set's; and in a table boxes stand as JSON.
    """
    kinds = [condition.kind for condition in model.conditions]
    numbers = next((one.names for one in model.conditions if one.kind == "scalars"), ())
    classes = _classes(model)
    sets = [one.name for one in classes.sets] if classes else []
    told, scalars, labels = {}, {}, {}
    for column, value in request.told.items():
        name = ALIASES.get(column, column)
        if column in sets and not isinstance(value, Mapping):
            labels[column] = value
        elif name in numbers:
            scalars[name] = value
        elif name == "class" and sets and isinstance(value, str) and value.startswith("{"):
            told[name] = _from_json(request.where, name, value)
        elif name in EMBEDDED and name not in kinds and EMBEDDED[name] in kinds:
            told[EMBEDDED[name]] = value
        else:
            told[name] = _from_json(request.where, name, value) if name in NESTED else value
    if scalars:
        told["scalars"] = {**told.get("scalars", {}), **scalars}
    if labels:
        told["class"] = {**_as_mapping(request.where, told.get("class", {})), **labels}
    return request._replace(told=told)


def _as_mapping(where: str, told: Any) -> Mapping[str, Any]:  # noqa: ANN401 - any JSON value
    if not isinstance(told, Mapping):
        raise DataError(f"{where}: {str(told)[:60]!r} names no label set, and others are named")
    return told


def _from_json(where: str, name: str, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name} is no JSON ({error}): {value[:60]}") from error
