"""What a condition is, whatever it was made from: three ways into the network.

A conditioner turns the values of a batch, one tensor, into a `Condition`, and knows the values that say
nothing, which classifier-free guidance needs (Ho and Salimans 2021).
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


def replaced(values: Tensor, others: Tensor, rows: Mask) -> Tensor:
    """Values of a condition whose `rows` are those of `others`."""
    shape = [-1] + [1] * (values.ndim - 1)
    return torch.where(rows.to(values.device).view(shape), others, values)


def stacked(first: Condition, second: Condition) -> Condition:
    """Two batches of conditions as one: the rows of `first`, then those of `second`."""

    def join(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else torch.cat([one, other])

    return Condition(*(join(*pair) for pair in zip(first, second, strict=True)))


def mixed(first: Condition, last: Condition, share: Float[Tensor, " batch"]) -> Condition:
    """Conditions on the straight line between two batches of them.

    Args:
        first: at share 0, exactly.
        last: at share 1, exactly.
        share: of each sample, 0 to 1; repeated where a batch holds every sample several times.
    """

    def line(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if one is None or other is None:
            return None
        weight = share.to(one).repeat(len(one) // len(share))
        return torch.lerp(one, other, weight.view([-1] + [1] * (one.ndim - 1)))

    return Condition(*(line(*pair) for pair in zip(first, last, strict=True)))
