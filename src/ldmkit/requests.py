"""What samples are told: as a user types it, from a file of lines, or as the latents of a set are."""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldmkit.condition_configs import ConditioningConfig
from ldmkit.conditioning.frozen_image import embedded_pictures, read_shown
from ldmkit.conditioning.frozen_text import embedded
from ldmkit.conditioning.kind import Sides
from ldmkit.conditioning.kinds import KINDS, readers_of, values_of
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import generator_for
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.digests import file_digest
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.manifest import MANIFEST
from ldmkit.modelfile import fingerprint
from ldmkit.request_lines import USUAL, Request, requests_of
from ldmkit.tower_configs import EmbeddedImageCondition, EmbeddedTextCondition

LIKE = 10
"""Place in the seed tree of what is random about conditions read from a set."""


class Asked(NamedTuple):
    """What all samples of a call are told."""

    said: list[dict[str, str]]
    """For people and for the sample file: what each sample is told, by kind of condition."""
    values: Callable[[Sequence[int]], dict[str, Tensor]]
    """Numbers of samples -> the values for the model."""
    digest: str
    """Of all that decides these values and what is kept."""
    kept: Callable[[Sequence[int]], dict[str, Tensor]] = lambda _: {}
    """Numbers of samples -> the pictures and holes that `decode` blends them with, where a set has them."""


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
    requests = requests_of(config, model, source)
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
        fingerprint(rows | {"turns": torch.tensor(turns)}),
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


def rows_of_set(latents: LatentSet, holdout: float) -> np.ndarray:
    """The samples of a set that take turns, int64: all, or those that training with this holdout left out.

    Raises:
        DataError: it left out none.
    """
    indices = np.arange(len(latents))
    if not holdout:
        return indices
    indices = np.delete(indices, latents.training_indices(holdout))
    if not len(indices):
        raise DataError(f"--holdout {holdout:g} keeps none of the latents back")
    return indices


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
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        return embedded(condition, list(places), config.text_weights)[[places[t] for t in texts]]
    if isinstance(condition, EmbeddedImageCondition):
        pictures = (_shown(condition, request) for request in requests)
        return embedded_pictures(condition, pictures, config.image_weights)
    return torch.stack([_row(condition, request, sides) for request in requests])


def _shown(condition: EmbeddedImageCondition, request: Request) -> Tensor | None:
    """The picture that one sample is told; None where it is told none."""
    value = request.told.get(condition.kind)
    if value is None:
        return None
    with _blamed_on(request):
        return read_shown(condition, value)


@contextmanager
def _blamed_on(request: Request) -> Iterator[None]:
    """Say which option or line holds a value that is wrong."""
    try:
        yield
    except (ValueError, DataError) as error:
        typed = request.where.startswith("--")
        raise (UsageError if typed else DataError)(f"{request.where}: {error}") from error


def _row(condition: Any, request: Request, sides: Sides) -> Tensor:  # noqa: ANN401 - any stored condition
    kind = KINDS[condition.kind]
    value = request.told.get(condition.kind, kind.silence)
    if value is None:
        raise UsageError(
            f"{request.where or 'the samples'}: the model has to be told {condition.kind}; give "
            "--conditions or --like"
        )
    with _blamed_on(request):
        row = kind.row(condition, value)
        wanted = kind.sides(condition, sides) if kind.sides else row.shape[-2:]
        if row.shape[-2:] != wanted:
            raise ValueError(
                f"{value} has {row.shape[-1]} x {row.shape[-2]} pixels; the model takes "
                f"{wanted[1]} x {wanted[0]}"
            )
        return row


def _as_the_set(
    config: SampleConfig, model: DiffusionConfig, shape: tuple[int, int, int], directory: Path
) -> Asked:
    latents = LatentSet(directory)
    if list(latents.shapes) != [shape] and any(one.channels for one in model.conditions):
        other = next(found for found in latents.shapes if found != shape)
        raise DataError(f"{directory} has latents of {other}; the samples are to be {shape}")
    readers = readers_of(model.conditions, ConditioningConfig().options_of, latents)
    indices = rows_of_set(latents, config.holdout)
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

    said = [{"like": latents.text("key", index)} for index in turns.tolist()]
    digest = file_digest(directory / MANIFEST) + fingerprint({"turns": torch.from_numpy(turns)})
    return Asked(said, values, digest, kept)


def as_lines(said: Sequence[Mapping[str, str]]) -> list[str]:
    """What samples are told, as JSON."""
    return [json.dumps(dict(one), ensure_ascii=False) for one in said]
