"""Every kind of condition: how it gets from a latent set, or from a user, into the network.

Values of a batch are one tensor for each condition, batch first. A conditioner turns them into a
`Condition`; what it is told nothing with are values too (`Conditioner.empty`), so that dropping a
condition, the null of guidance and a user who says nothing are one and the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ldmkit.condition_configs import ClassCondition, ClassSettings
from ldmkit.conditioning.classes import NO_CLASS, ClassConditioner, class_index, class_row
from ldmkit.conditioning.condition import Condition
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError

Values = Mapping[str, Tensor]
"""What a batch is told, by kind of condition."""
Reader = Callable[[np.ndarray, torch.Generator], Tensor]
"""Indices into a latent set, a source of whatever is random -> values of these samples."""


@runtime_checkable
class Conditioner(Protocol):
    """A module that turns values into a condition; no row depends on another."""

    def empty(self, values: Tensor) -> Tensor:
        """Values of the same shape that say nothing."""
        ...

    def __call__(self, values: Tensor) -> Condition:
        """The condition of a batch."""
        ...


class Widths(NamedTuple):
    """What the network asks of conditions."""

    context: int
    """Of tokens."""
    embedding: int
    """Of the time embedding, to which vectors are added."""


class Kind(NamedTuple):
    """One kind of condition; the functions take its stored config first, but for `settle`."""

    column: str
    """Of the latent set, where training finds it."""
    settle: Callable[[Any, LatentSet], Any]
    """Settings and data -> the config that a model file stores. Raises DataError."""
    build: Callable[[Any, Widths], nn.Module]
    """-> `Conditioner` with fresh weights."""
    reader: Callable[[Any, LatentSet], Reader]
    """-> what reads training values. Raises DataError where the set does not fit the config."""
    row: Callable[[Any, Any], Tensor]
    """A value as a user gives it -> the values of one sample. Raises ValueError."""
    silence: Any = None
    """What a user says who says nothing; None where something has to be said."""
    words: Callable[[Any, Any], str] = lambda _, value: str(value)
    """What a user says, as file names and lists show it."""


def values_of(
    readers: Mapping[str, Reader], indices: np.ndarray, generator: torch.Generator
) -> dict[str, Tensor]:
    """The values of some samples of a latent set, in a fixed order of draws."""
    return {kind: reader(indices, generator) for kind, reader in readers.items()}


def readers_of(conditions: Sequence[Any], latents: LatentSet) -> dict[str, Reader]:
    """What reads the values of every condition.

    Raises:
        DataError: the set does not hold what a condition needs, or names it otherwise.
    """
    return {config.kind: KINDS[config.kind].reader(config, latents) for config in conditions}


def joined(conditions: Sequence[Condition]) -> Condition:
    """Several conditions of the same batch as one: vectors are added up, tokens and channels strung together."""
    vectors, tokens, channels, _ = (
        ([part for part in ways if part is not None] for ways in zip(*conditions, strict=True))
        if conditions
        else ([], [], [], [])
    )
    return Condition(
        vector=torch.stack(vectors).sum(0) if vectors else None,
        tokens=torch.cat(tokens, dim=1) if tokens else None,
        channels=torch.cat(channels, dim=1) if channels else None,
    )


# class


def _settle_class(settings: ClassSettings, latents: LatentSet) -> ClassCondition:
    if not latents.has_labels:
        raise DataError(f"--condition class: {latents.directory} has no labels")
    return ClassCondition(way=settings.way, names=latents.manifest.class_names)


def _build_class(config: ClassCondition, widths: Widths) -> ClassConditioner:
    width = widths.context if config.attended else widths.embedding
    return ClassConditioner((len(config.names),), width, way=config.way)


def _class_reader(config: ClassCondition, latents: LatentSet) -> Reader:
    if latents.manifest.class_names != config.names:
        raise DataError(f"{latents.directory} have other classes than the model")
    return lambda indices, _: torch.from_numpy(latents.labels[indices])[:, None]


def _class_words(config: ClassCondition, value: Any) -> str:  # noqa: ANN401 - name or index
    index = class_index(value, config.names)
    return config.names[index] if index >= 0 else ""


KINDS: dict[str, Kind] = {
    "class": Kind(
        column="label",
        settle=_settle_class,
        build=_build_class,
        reader=_class_reader,
        row=lambda config, value: class_row([value], [config.names]),
        silence=NO_CLASS,
        words=_class_words,
    ),
}
"""Keep in step with `condition_configs.ConditionKind`; a test compares them."""
