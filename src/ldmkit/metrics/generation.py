"""How far generated pictures are from real ones, as functions of a network's features.

All of it is computed in float64, and equals torch-fidelity 0.4.0 where that has the same.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Points = Float[Tensor, "_count features"]
"""Features of a set of pictures, in any float format."""
Logits = Float[Tensor, "count classes"]

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, INCEPTION_SPLITS = 100, 1000, 10
REFERENCE_SEED = 2020
"""Of torch-fidelity's random subsets and orders."""
NEIGHBOUR, DENSE_NEIGHBOUR = 3, 5
"""Whose distance is the radius of a point's ball: for precision and recall (Kynkäänniemi et al. 2019), for
density and coverage (Naeem et al. 2020)."""
FEWEST = DENSE_NEIGHBOUR + 1
"""Pictures that each side must have."""
SAME_POINT = 1e-12
"""Share of their squared lengths below which a squared distance is rounding."""
BLOCK = 1024


class Estimate(NamedTuple):
    """A mean over parts of the pictures and its spread over them."""

    mean: float
    std: float


class Neighbourhoods(NamedTuple):
    """Which points lie in whose balls."""

    precise: Bool[Tensor, " samples"]
    """The sample lies in a real picture's ball (of its 3rd neighbour)."""
    density: Float[Tensor, " samples"]
    """In how many real balls (of the 5th neighbour) it lies, over 5."""
    recalled: Bool[Tensor, "real samples"]
    """The real picture lies in the sample's ball (of its 3rd neighbour)."""
    covered: Bool[Tensor, "real samples"]
    """The sample lies in the real picture's ball (of its 5th neighbour)."""


def polynomial_kernel(a: Points, b: Points) -> Float[Tensor, "_first _second"]:
    """(a b / f + 1)^3 for f features (Binkowski et al. 2018, Eq. 3), float64."""
    base = a.double() @ b.double().T / a.shape[1] + 1.0
    return base * base * base


def kernel_distance(samples: Points, real: Points) -> Estimate:
    """KID: unbiased squared MMD with the cubic kernel, over random subsets (Binkowski et al. 2018).

    100 subsets of 1,000 of each side, drawn as torch-fidelity draws them; with fewer than 1,000 on a
    side, subsets of as many as the smaller one has. It may be slightly negative.
    """
    size = min(KERNEL_SUBSET_SIZE, len(samples), len(real))
    draw = np.random.RandomState(REFERENCE_SEED)
    everything = size == len(samples) == len(real)  # then all subsets are the same one
    found = []
    for _ in range(1 if everything else KERNEL_SUBSETS):
        x, y = (
            side[torch.from_numpy(draw.choice(len(side), size, replace=False))]
            for side in (samples, real)
        )
        found.append(squared_mmd(x, y))
    return Estimate(float(np.mean(found)), float(np.std(found)))


def squared_mmd(x: Points, y: Points) -> float:
    """Unbiased squared MMD of equally many points (Gretton et al. 2012, Eq. 3)."""
    count = len(x)
    within = sum(
        kernel.sum() - kernel.trace()
        for kernel in (polynomial_kernel(x, x), polynomial_kernel(y, y))
    )
    between = polynomial_kernel(x, y).sum()
    return float(within / (count * (count - 1)) - 2.0 * between / count**2)


def inception_score(logits: Logits) -> Estimate:
    """exp(mean KL divergence of the class probabilities to their mean), over 10 parts.

    (Salimans et al. 2016, Sec. 4.) The order is torch-fidelity's.
    """
    order = np.random.RandomState(REFERENCE_SEED).permutation(len(logits))
    scores = inception_scores(logits[torch.from_numpy(order)].double().log_softmax(dim=1))
    return Estimate(scores.mean().item(), scores.std(correction=0).item())


def inception_scores(log_probabilities: Logits) -> Float[Tensor, " splits"]:
    """The score of each part of consecutive pictures; fewer parts than 10 below 10 pictures."""
    count = len(log_probabilities)
    splits = min(INCEPTION_SPLITS, count)
    scores = []
    for part in range(splits):
        log_p = log_probabilities[part * count // splits : (part + 1) * count // splits]
        p = log_p.exp()
        mean = p.mean(dim=0, keepdim=True)
        scores.append((p * (log_p - mean.log())).sum(dim=1).mean().exp())
    return torch.stack(scores)


def neighbourhoods(samples: Points, real: Points) -> Neighbourhoods:
    """What precision, recall, density and coverage are made of.

    A point's ball reaches to its k-th neighbour in its own set, which is in it. Both sides need
    `FEWEST` points.
    """
    near, far = (k + 1 for k in (NEIGHBOUR, DENSE_NEIGHBOUR))  # each point is its own nearest
    sample_radius = _sorted_distances(samples, near)[:, -1]
    radii = _sorted_distances(real, far)
    parts = []
    for block, radius in zip(real.split(BLOCK), radii.split(BLOCK), strict=True):
        between = distances(block, samples)
        parts.append(
            (
                between <= radius[:, near - 1, None],
                between <= sample_radius,
                between <= radius[:, far - 1, None],
            )
        )
    inside, recalled, covered = (torch.cat(part) for part in zip(*parts, strict=True))
    density = covered.sum(0).double() / DENSE_NEIGHBOUR
    return Neighbourhoods(inside.any(0), density, recalled, covered)


def shares(balls: Neighbourhoods) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""
    return {
        "precision": balls.precise.double().mean().item(),
        "recall": balls.recalled.any(1).double().mean().item(),
        "density": balls.density.mean().item(),
        "coverage": balls.covered.any(1).double().mean().item(),
    }


def distances(a: Points, b: Points) -> Float[Tensor, "_first _second"]:
    """Euclidean distances in float64; those of equal points are exactly 0."""
    a, b = a.double(), b.double()
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = lengths - 2.0 * (a @ b.T)
    return torch.where(squared > SAME_POINT * lengths, squared, 0.0).sqrt()


def nearest(points: Points, others: Points) -> tuple[Tensor, Tensor]:
    """For each point the place of the nearest among `others`, and its distance (float64)."""
    found = [distances(block, others).min(dim=1) for block in points.split(BLOCK)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def _sorted_distances(points: Points, count: int) -> Float[Tensor, "points count"]:
    """Distances of each point to the nearest of its own set, itself first, in rising order."""
    return torch.cat(
        [
            distances(block, points).topk(count, dim=1, largest=False).values
            for block in points.split(BLOCK)
        ]
    )
