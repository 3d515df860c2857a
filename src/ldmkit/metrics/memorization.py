"""Whether a model gives back its training pictures: samples nearer to one than held-back pictures are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ldmkit.data.order import generator_for
from ldmkit.data.similarity import same_picture, small_version
from ldmkit.metrics.generation import Points, nearest
from ldmkit.tensors import Images

PLACE = 13
"""In the seed tree."""
MARGIN = 0.7
"""The nearest of a thousand samples is nearer than the nearest of a hundred held-back pictures without being a
copy; copies are much nearer (docs/log.md)."""


class Nearness(NamedTuple):
    """Pictures and the training picture nearest to each in feature space."""

    place: Int[Tensor, " pictures"]
    """Of the training picture in its list."""
    features: Float[Tensor, " pictures"]
    """Distance to it in feature space."""
    pixels: Float[Tensor, " pictures"]
    """Root mean square difference to it in units of [-1, 1], of the nearer of it and its mirror image."""
    same: Bool[Tensor, " pictures"]
    """They differ by no more than another encoding would make them differ."""

    @property
    def product(self) -> Float[Tensor, " pictures"]:
        """Distance in features times that in pixels: small where both say so, whatever their units.

        Neither alone tells a compressed copy from a picture that is only alike: a network sees other
        noise, pixels see the same background (docs/log.md).
        """
        return self.features.double() * self.pixels.double()


class Verdict(NamedTuple):
    """Which samples are copies, and by what measure."""

    copies: Bool[Tensor, " samples"]
    limit: float
    """Nearness below which a sample is a copy."""
    duplicates: int
    """Held-back pictures that are in the training set; they do not count for the limit."""


def pixel_distance(images: Images, others: Images) -> Float[Tensor, " batch"]:
    """Root mean square difference of each pair, or to the mirror image (left and right) if less."""
    straight, mirrored = (
        (images - version).square().mean(dim=(1, 2, 3)).sqrt()
        for version in (others, others.flip(3))
    )
    return torch.minimum(straight, mirrored)


def same_pictures(images: Images, others: Images) -> Bool[Tensor, " batch"]:
    """Whether each pair, or one and the other's mirror image, shows the same (`data.similarity`)."""
    found: list[bool] = []
    for image, other in zip(images, others, strict=True):
        small: list[np.ndarray] = [small_version(one) for one in (image, other, other.flip(2))]
        found.append(any(same_picture(small[0], version) for version in small[1:]))
    return torch.tensor(found, dtype=torch.bool)


def verdict(samples: Nearness, held_back: Nearness, quantile: float) -> Verdict:
    """Call a sample a copy if it shows the same as its nearest training picture, or is too near to it.

    Too near: by the product of both distances, nearer than `MARGIN` times the `quantile` of held-back
    pictures (0: than any), which the model cannot have copied. Held-back pictures that are training
    pictures by another name would make this measure worthless and are left out.
    """
    apart = ~held_back.same
    limit = 0.0
    if apart.any():
        limit = MARGIN * held_back.product[apart].quantile(quantile, interpolation="lower").item()
    return Verdict(samples.same | (samples.product < limit), limit, int(held_back.same.sum()))


def nearer_to_training(samples: Points, training: Points, held_back: Points, seed: int) -> float:
    """Share of the samples that are nearer to training than to held-back pictures, equally many of each.

    One half without memory. Where there are more training pictures, they are drawn by `seed`.
    """
    count = min(len(training), len(held_back))
    distances = []
    for number, points in enumerate((training, held_back)):
        order = torch.randperm(len(points), generator=generator_for(seed, PLACE, number))
        distances.append(nearest(samples, points[order[:count]])[1])
    closer, even = distances[0] < distances[1], distances[0] == distances[1]
    return (closer.double() + 0.5 * even.double()).mean().item()


def nearest_first(samples: Nearness) -> Sequence[int]:
    """Samples in order: those that show the same as a training picture first, then by nearness."""
    return sorted(
        range(len(samples.place)),
        key=lambda i: (
            not samples.same[i],
            samples.product[i].item(),
            samples.features[i].item(),
        ),
    )
