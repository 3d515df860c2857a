"""Whether a model gives back its training pictures: samples nearer to one than held-back pictures are.

Pictures are compared by the means of overlapping areas, and by the area in which they differ most: a copy, however
it was compressed, differs nowhere much, another picture somewhere, however alike the rest is. Root mean squares
call pictures on the same flat background alike, and networks see an encoder's noise (docs/log.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ldmkit.data.order import generator_for
from ldmkit.metrics.generation import BLOCK, Points, nearest
from ldmkit.tensors import Images

PLACE = 13
"""In the seed tree."""
SIDE, AREA, STRIDE = 32, 4, 2
"""Of the small versions, of the areas in them, and from one area to the next, pixels."""
SAME = 12.0 / 127.5
"""Largest difference of area means, in units of [-1, 1], that another encoding makes: JPEG of quality 90 makes up to
11 of 255, of quality 75 up to 14 (docs/log.md)."""
MARGIN = 0.5
"""The nearest of a thousand samples is nearer than the nearest of a hundred held-back pictures without being a
copy; copies are much nearer (docs/log.md)."""
CANDIDATES = 16
"""Training pictures with the least sum of squares over areas whose largest difference is looked at."""

Areas = Float[Tensor, "_count channels rows columns"]


class Nearness(NamedTuple):
    """Pictures and the training picture nearest to each."""

    place: Int[Tensor, " pictures"]
    """Of the training picture in its list."""
    areas: Float[Tensor, " pictures"]
    """Largest difference of area means to it, in units of [-1, 1], of the nearer of it and its mirror image."""

    @property
    def same(self) -> Bool[Tensor, " pictures"]:
        """They differ by no more than another encoding would make them differ."""
        return self.areas <= SAME


class Verdict(NamedTuple):
    """Which samples are copies, and by what measure."""

    copies: Bool[Tensor, " samples"]
    limit: float
    """Difference up to which a sample is a copy."""
    duplicates: int
    """Held-back pictures that are in the training set; they do not count for the limit."""


def area_means(images: Images) -> Areas:
    """Means of overlapping areas of pictures, whatever their size: `[n, c, 15, 15]`."""
    small = F.adaptive_avg_pool2d(images.float(), SIDE)
    return F.avg_pool2d(small, AREA, stride=STRIDE)


def nearness(pictures: Areas, training: Sequence[Areas]) -> Nearness:
    """The training picture nearest to each picture, or to its mirror image (left and right).

    Args:
        pictures: area means.
        training: area means of the training pictures, perhaps in several versions: as they are, and as
            the autoencoder gives them back, which is what a latent model that knows them by heart draws.
    """
    every = torch.cat([version.flatten(1) for version in training])
    count = len(training[0])
    places, least = [], []
    for block in pictures.split(BLOCK):
        both = torch.stack([block.flatten(1), block.flip(3).flatten(1)])
        found = torch.cdist(both, every).topk(min(CANDIDATES, len(every)), largest=False).indices
        difference = torch.stack(
            [(every[found[:, row]] - both[:, row, None]).abs().amax(2) for row in range(len(block))]
        )
        value, which = difference.flatten(1).min(dim=1)
        chosen = found.transpose(0, 1).flatten(1).gather(1, which[:, None])[:, 0]
        places.append(chosen % count)
        least.append(value)
    return Nearness(torch.cat(places), torch.cat(least))


def verdict(samples: Nearness, held_back: Nearness, quantile: float) -> Verdict:
    """Call a sample a copy if it shows the same as a training picture, or is too near to it.

    Too near: nearer than `MARGIN` times the `quantile` of held-back pictures (0: than any), which the model cannot
    have copied. Held-back pictures that are training pictures by another name would make this measure worthless
    and are left out.
    """
    apart = ~held_back.same
    limit = SAME
    if apart.any():
        usual = held_back.areas[apart].double().quantile(quantile, interpolation="lower").item()
        limit = max(SAME, MARGIN * usual)
    return Verdict(samples.areas <= limit, limit, int(held_back.same.sum()))


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
    """Samples in order of nearness."""
    return sorted(range(len(samples.place)), key=lambda i: samples.areas[i].item())
