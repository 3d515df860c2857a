"""Every metric of generated pictures in the features of one network, with its interval and its floor."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldmkit.data.order import generator_for
from ldmkit.errors import DataError
from ldmkit.metrics.bootstrap import (
    Counts,
    frechet_draws,
    interval,
    kernel_draws,
    resampling_counts,
    score_draws,
    share_draws,
)
from ldmkit.metrics.feature_networks import Side
from ldmkit.metrics.frechet import FeatureStatistics, frechet_distance
from ldmkit.metrics.generation import (
    FEWEST,
    inception_score,
    kernel_distance,
    neighbourhoods,
    shares,
)

HALVES = 14
"""Place in the seed tree of the two halves of the real pictures."""
LABELS = {
    "effnet": {"frechet": "FD-effnet", "kernel": "KD-effnet"},
    "inception": {"frechet": "FID", "kernel": "KID", "score": "IS"},
}
"""What the distances of a network are called; only Inception's are FID and KID."""
LIMITS = {
    **dict.fromkeys(("precision", "recall", "coverage"), (0.0, 1.0)),
    **dict.fromkeys(("KD-effnet", "KID"), (-math.inf, math.inf)),
    "IS": (1.0, math.inf),
}
"""What a number can be where that is not 0 to infinity."""


class Number(NamedTuple):
    """One metric."""

    value: float
    interval: tuple[float, float] | None
    """95 %, over samples; None without bootstrap."""
    floor: float | None
    """The same between two halves of the real pictures; None where there are too few."""


class Quality(NamedTuple):
    """The metrics of one network."""

    numbers: dict[str, Number]
    """By label."""
    samples: int
    real: int
    floor_pictures: int | None
    """Real pictures in each half of the floor."""


def moments_of(side: Side) -> tuple[Tensor, Tensor]:
    """Mean and covariance of features, float64."""
    statistics = FeatureStatistics()
    statistics.add(side.features)
    return statistics.moments()


def quality(
    network: str,
    samples: Side,
    real: Side,
    moments: tuple[Tensor, Tensor],
    *,
    draws: int,
    seed: int,
) -> Quality:
    """All metrics of the samples.

    Args:
        network: a key of `LABELS`.
        samples: generated pictures.
        real: what they should be like.
        moments: mean and covariance of the real features.
        draws: of the bootstrap; 0 = no intervals.
        seed: of the bootstrap and the halves.

    Raises:
        DataError: there are fewer than `FEWEST` pictures on a side.
    """
    few = min(len(samples.features), len(real.features))
    if few < FEWEST:
        raise DataError(f"metrics need {FEWEST} pictures or more on each side; there are {few}")
    labels = LABELS[network]
    counts = resampling_counts(len(samples.features), draws, seed) if draws else None
    found, drawn = _measured(samples, real, moments, labels, counts)
    floor, half = _floor(real, len(samples.features), labels, seed)
    numbers = {
        label: Number(
            value,
            _possible(label, interval(drawn[label], value)) if label in drawn else None,
            floor.get(label),
        )
        for label, value in found.items()
    }
    return Quality(numbers, len(samples.features), len(real.features), half)


def _possible(label: str, ends: tuple[float, float]) -> tuple[float, float]:
    """The ends of an interval, moved percentiles, within what the number can be."""
    low, high = LIMITS.get(label, (0.0, math.inf))
    return max(low, ends[0]), min(high, ends[1])


def _measured(
    samples: Side,
    real: Side,
    moments: tuple[Tensor, Tensor],
    labels: dict[str, str],
    counts: Counts | None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Values by label, and those of the bootstrap's draws."""
    x, y = samples.features, real.features
    balls = neighbourhoods(x, y)
    found = {
        labels["frechet"]: frechet_distance(moments, moments_of(samples)),
        labels["kernel"]: kernel_distance(x, y).mean,
    }
    logits = samples.logits if "score" in labels else None
    if logits is not None:
        found[labels["score"]] = inception_score(logits).mean
    found |= shares(balls)
    if counts is None:
        return found, {}
    drawn = {
        labels["frechet"]: frechet_draws(x, moments, counts),
        labels["kernel"]: kernel_draws(x, y, counts),
        **share_draws(balls, counts),
    }
    if logits is not None:
        drawn[labels["score"]] = score_draws(logits, counts)
    return found, drawn


def _floor(
    real: Side, count: int, labels: dict[str, str], seed: int
) -> tuple[dict[str, float], int | None]:
    """The metrics between two halves of the real pictures, of `count` each if there are enough."""
    half = min(count, len(real.features) // 2)
    if half < FEWEST:
        return {}, None
    order = torch.randperm(len(real.features), generator=generator_for(seed, HALVES))
    first, second = (
        Side(real.features[rows], real.logits[rows] if real.logits is not None else None)
        for rows in (order[:half], order[half : 2 * half])
    )
    return _measured(first, second, moments_of(second), labels, None)[0], half
