"""What a condition is, whatever it was made from: three ways into the network.

A conditioner turns part of a batch into a `Condition` and knows its null, the condition of a sample
that is told nothing (for classifier-free guidance, Ho and Salimans 2021).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Mask


class Condition(NamedTuple):
    """A batch of conditions; None where a way is not used."""

    vector: Float[Tensor, "batch width"] | None = None
    """Added to the time embedding."""
    tokens: Float[Tensor, "batch count width"] | None = None
    """Attended to by cross-attention."""
    channels: Float[Tensor, "batch channels y x"] | None = None
    """Concatenated to the latents."""
    previous: Float[Tensor, "rows latent_channels y x"] | None = None
    """Clean latents that the network itself expected before, for self-conditioning; repeated where a
    batch holds every sample several times."""


def dropped(condition: Condition, null: Condition, drop: Mask) -> Condition:
    """Replace the condition of the samples where `drop` is true by the null."""

    def choose(given: Tensor | None, nothing: Tensor | None) -> Tensor | None:
        if given is None or nothing is None:
            return None
        shape = [-1] + [1] * (given.ndim - 1)
        return torch.where(drop.to(given.device).view(shape), nothing, given)

    return Condition(*(choose(*pair) for pair in zip(condition, null, strict=True)))


def stacked(first: Condition, second: Condition) -> Condition:
    """Two batches of conditions as one: the rows of `first`, then those of `second`."""

    def join(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else torch.cat([one, other])

    return Condition(*(join(*pair) for pair in zip(first, second, strict=True)))
