"""What every kind of condition has: how it gets from a latent set, or from a user, into the network.

Values of a batch are one tensor for each condition, batch first. A conditioner turns them into a
`Condition`; what it is told nothing with are values too (`Conditioner.empty`), so that dropping a
condition, the null of guidance and a user who says nothing are one and the same.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ldmkit.conditioning.condition import Condition
from ldmkit.data.latent_set import LatentSet

Values = Mapping[str, Tensor]
"""What a batch is told, by kind of condition."""
Reader = Callable[[np.ndarray, torch.Generator], Tensor]
"""Indices into a latent set, a source of whatever is random -> values of these samples."""
Sides = tuple[int, int]
"""Height and width."""


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


def as_said(config: Any, value: Any) -> str:  # noqa: ANN401 - any stored config, any value
    """What a user says, as it is."""
    del config
    return str(value)


def takes_nothing(conditioner: nn.Module, latents: LatentSet) -> None:
    """The config says everything."""


class Kind(NamedTuple):
    """One kind of condition; its functions take the config that a model file stores."""

    settle: Callable[[Any, LatentSet], Any]
    """Options and data -> that config. Raises DataError where the set does not hold the condition."""
    build: Callable[[Any, Widths], nn.Module]
    """-> `Conditioner` with fresh weights."""
    reader: Callable[[Any, Any, LatentSet], Reader]
    """And training options -> what reads values. Raises DataError where the set does not fit."""
    row: Callable[[Any, Any], Tensor]
    """And a value as a user gives it -> the values of one sample. Raises ValueError."""
    silence: Any = None
    """What a user says who says nothing; None where something has to be said."""
    start: Callable[[nn.Module, LatentSet], None] = takes_nothing
    """Before training: a conditioner takes over from the data what its config does not hold."""
    sides: Callable[[Any, Sides], Sides] | None = None
    """And height and width of the latents -> of the values; None where these have none, or any."""
    words: Callable[[Any, Any], str] = as_said
    """And what a user says -> as file names and lists show it."""
