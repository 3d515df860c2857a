"""What samples are told: as a user types it, from a file of lines, or as the latents of a set are."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldmkit.condition_configs import ConditioningConfig, EmbeddedTextCondition
from ldmkit.conditioning.frozen_text import embedded
from ldmkit.conditioning.kind import Sides
from ldmkit.conditioning.kinds import KINDS, readers_of, values_of
from ldmkit.configs import STREAM
from ldmkit.data.formats.tables import Row, read_jsonl, read_table
from ldmkit.data.items import Problem
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import generator_for
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.seals import read_limited, read_within

MAX_BYTES = 1 << 30
"""Of a file of prompts or conditions."""
USUAL = 16
"""Samples, where nothing says how many."""
LIKE = 10
"""Place in the seed tree of what is random about conditions read from a set."""
ALIASES = {"label": "class", "prompt": "text", "caption": "text", "boxes": "layout"}
"""Other names of columns."""
TABLES = (".jsonl", ".csv")
NESTED = ("layout", "scalars")
"""Kinds whose values are lists or objects."""


class Asked(NamedTuple):
    """What all samples of a call are told."""

    said: list[dict[str, str]]
    """For people and for the sample file: what each sample is told, by kind of condition."""
    values: Callable[[Sequence[int]], dict[str, Tensor]]
    """Numbers of samples -> the values for the model."""
    kept: Callable[[Sequence[int]], dict[str, Tensor]] = lambda _: {}
    """Numbers of samples -> the pictures and holes that `decode` blends them with, where a set has them."""


class Request(NamedTuple):
    """What one sample is told."""

    where: str
    """The option, or the file and line, that says so."""
    told: Mapping[str, Any]
    """By kind of condition."""


def asked_of(
    config: SampleConfig,
    model: DiffusionConfig,
    shape: tuple[int, int, int],
    source: BufferedIOBase | None,
) -> Asked:
    """What the samples are told.

    Args:
        config: of the command.
        model: what it can be told.
        shape: of the latents to draw: channels, height, width.
        source: where lines come from if the config says `-`.

    Raises:
        UsageError: the model cannot be told it, or an option has no such value.
        DataError: a file cannot be read, or a line of it has no such value.
    """
    if config.like is not None:
        return _as_the_set(config, model, shape, config.like)
    kinds = [condition.kind for condition in model.conditions]
    requests = [_understood(one, model) for one in _requests(config, model, source)]
    count = config.num or (len(requests) if config.prompts or config.conditions else USUAL)
    turns = [number % len(requests) for number in range(count)]
    for request in requests:
        _require_known(request, kinds, str(config.model))
    rows = {
        condition.kind: _rows_of_kind(condition, requests, config, shape[1:])
        for condition in model.conditions
    }
    said = [
        {
            condition.kind: KINDS[condition.kind].words(condition, request.told[condition.kind])
            for condition in model.conditions
            if condition.kind in request.told
        }
        for request in requests
    ]
    return Asked(
        [said[turn] for turn in turns],
        lambda numbers: {kind: found[[turns[n] for n in numbers]] for kind, found in rows.items()},
    )


def text_values(model: DiffusionConfig, text: str, where: str) -> Tensor:
    """The values of one sample that is told a text.

    Args:
        model: what it can be told.
        text: in words.
        where: the option that says it.

    Raises:
        UsageError: the model cannot be told a text, or not this one.
    """
    request = Request(where, {"text": text})
    conditions = {condition.kind: condition for condition in model.conditions}
    _require_known(request, list(conditions), "the model")
    return _row(conditions["text"], request, (0, 0))  # no size matters to a text


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
    told: dict[str, tuple[str, ...]] = {}
    if config.label:
        told["class"] = config.label
    if config.prompt:
        told["text"] = config.prompt
    if not told and _classes(model):
        told["class"] = _classes(model)
    count = max((len(values) for values in told.values()), default=1)
    names = {"class": "--label", "text": "--prompt"}
    return [
        Request(
            ", ".join(
                f"{names[kind]} {values[turn % len(values)]}" for kind, values in told.items()
            ),
            {kind: values[turn % len(values)] for kind, values in told.items()},
        )
        for turn in range(count)
    ]


def _classes(model: DiffusionConfig) -> tuple[str, ...]:
    return next((one.names for one in model.conditions if one.kind == "class"), ())


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
    """The kinds of condition that a row speaks of; what is empty says nothing."""
    return {
        ALIASES.get(name, name): value
        for name, value in row.values.items()
        if value not in ("", None)
    }


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

    Text is text for the user, whichever way the model reads it; a column may be a scalar's; and in a
    table boxes stand as JSON.
    """
    kinds = [condition.kind for condition in model.conditions]
    numbers = next((one.names for one in model.conditions if one.kind == "scalars"), ())
    told, scalars = {}, {}
    for name, value in request.told.items():
        if name in numbers:
            scalars[name] = value
        elif name == "text" and "text" not in kinds and "embedded-text" in kinds:
            told["embedded-text"] = value
        else:
            told[name] = _from_json(request.where, name, value) if name in NESTED else value
    if scalars:
        told["scalars"] = {**told.get("scalars", {}), **scalars}
    return request._replace(told=told)


def _from_json(where: str, name: str, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name} is no JSON ({error}): {value[:60]}") from error


def _require_known(request: Request, kinds: Sequence[str], model: str) -> None:
    for name in request.told:
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"it knows {_listed(kinds)}"
            raise UsageError(f"{request.where}: {model} was trained without {name}; {hint}")


def _listed(kinds: Iterable[str]) -> str:
    return ", ".join(kinds) or "no conditions"


def _rows_of_kind(
    condition: Any,  # noqa: ANN401
    requests: Sequence[Request],
    config: SampleConfig,
    sides: Sides,
) -> Tensor:
    """The values of all requests."""
    if isinstance(condition, EmbeddedTextCondition):
        texts = [str(request.told.get(condition.kind, "")) for request in requests]
        return embedded(condition, texts, config.text_weights)
    return torch.stack([_row(condition, request, sides) for request in requests])


def _row(condition: Any, request: Request, sides: Sides) -> Tensor:  # noqa: ANN401 - any stored condition
    kind = KINDS[condition.kind]
    value = request.told.get(condition.kind, kind.silence)
    if value is None:
        raise UsageError(
            f"{request.where or 'the samples'}: the model has to be told {condition.kind}; give "
            "--conditions or --like"
        )
    try:
        row = kind.row(condition, value)
        wanted = kind.sides(condition, sides) if kind.sides else row.shape[-2:]
        if row.shape[-2:] != wanted:
            raise ValueError(
                f"{value} has {row.shape[-1]} x {row.shape[-2]} pixels; the model takes "
                f"{wanted[1]} x {wanted[0]}"
            )
        return row
    except (ValueError, DataError) as error:
        typed = request.where.startswith("--")
        raise (UsageError if typed else DataError)(f"{request.where}: {error}") from error


def _as_the_set(
    config: SampleConfig, model: DiffusionConfig, shape: tuple[int, int, int], directory: Path
) -> Asked:
    latents = LatentSet(directory)
    if list(latents.shapes) != [shape] and any(one.channels for one in model.conditions):
        other = next(found for found in latents.shapes if found != shape)
        raise DataError(f"{directory} has latents of {other}; the model was trained on {shape}")
    readers = readers_of(model.conditions, ConditioningConfig().options_of, latents)
    indices = np.arange(len(latents))
    if config.holdout:
        indices = np.setdiff1d(indices, latents.training_indices(config.holdout))
        if not len(indices):
            raise DataError(f"--holdout {config.holdout:g} keeps none of the latents back")
    turns = indices[np.arange(config.num or USUAL) % len(indices)]

    def values(numbers: Sequence[int]) -> dict[str, Tensor]:
        alone = [
            values_of(readers, turns[[n]], generator_for(config.seed, LIKE, n)) for n in numbers
        ]
        return {kind: torch.cat([one[kind] for one in alone]) for kind in readers}

    painting = "mask" in readers and {"image", "hole"} <= set(latents.manifest.columns)

    def kept(numbers: Sequence[int]) -> dict[str, Tensor]:
        columns = ("image", "hole") if painting else ()
        return {name: latents.rows(name, turns[list(numbers)]) for name in columns}

    return Asked([{"like": latents.text("key", index)} for index in turns.tolist()], values, kept)


def as_lines(said: Sequence[Mapping[str, str]]) -> list[str]:
    """What samples are told, as JSON."""
    return [json.dumps(dict(one), ensure_ascii=False) for one in said]
