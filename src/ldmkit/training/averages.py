"""Averages of the weights over training, and how any width of average is made of two that were kept.

A power-function average after t updates weighs the weights after update i with about i^gamma: its
width relative to t stays the same for the whole run (Karras et al. 2024, "Analyzing and improving the
training dynamics of diffusion models", Sec. 3.1). Its relative width, the standard deviation of the
profile as a share of t, is what configs call `width`. Profiles of several widths and steps are
functions of which any other is nearly a linear combination (Sec. 3.2, App. C): `reconstruction` finds it.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from ldmkit.diffusion_configs import AverageConfig

Module = TypeVar("Module", bound=nn.Module)
Vector = Float[np.ndarray, " n"]
Matrix = Float[np.ndarray, "n k"]

ROUNDING = {"float32": 2**-24 / 3**0.5, "float16": 2**-11 / 3**0.5}
"""Relative standard deviation of rounding a number to a format, at most."""
MOTION = 0.1
"""By how much of their size weights move within an average, roughly: what a missed part of a profile
costs, measured by what rounding costs."""
RIDGE = 1e-13
"""Least share of a profile's square that is added to it; the condition number stays below n / RIDGE."""

NEWTON_STEPS = 20  # a handful is enough but for widths near the largest


class Profile(NamedTuple):
    """What one power-function average weighs: all updates up to `step`, with this relative width."""

    step: int
    width: float


class Reconstruction(NamedTuple):
    """An average as a linear combination of others."""

    coefficients: Vector
    """One for each profile that there is; they add up to 1."""
    error: float
    """Norm of what is left of the wanted profile, as a share of its own norm."""
    rounding: float
    """Relative error of the result that stems from how precisely the others were stored."""


def averaged_copy(module: Module) -> Module:
    """A frozen copy of a module, to hold the average of its weights."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the average of all parameters towards the module's; buffers are copied.

    Args:
        average: what `averaged_copy` made of the module.
        module: after an update.
        decay: share of the former average that stays.
    """
    for kept, current in zip(average.parameters(), module.parameters(), strict=True):
        kept.lerp_(current, 1.0 - decay)
    for kept, current in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(current)


def decay_at(step: int, config: AverageConfig) -> float:
    """The decay to update the average with after the update of `step` (counted from 0)."""
    if config.kind == "power":
        return power_decay(step, config.width)
    return warmed_decay(step, config.decay)


def warmed_decay(step: int, decay: float) -> float:
    """The decay of an exponential average, warmed up: min(decay, (1 + n) / (10 + n)), n updates so far."""
    return min(decay, (1 + step) / (10 + step))


def power_decay(step: int, width: float) -> float:
    """The decay of a power-function average: (1 - 1/t)^(gamma + 1), t = step + 1 updates.

    So the weights after update i count (i^(gamma+1) - (i-1)^(gamma+1)) / t^(gamma+1), and those
    before the first update nothing (Karras et al. 2024, Eq. 127).
    """
    return (step / (step + 1)) ** (exponent(width) + 1.0)


def exponent(width: float) -> float:
    """The gamma of a relative width in (0, 1/sqrt(12)), by Newton's method.

    The profile tau^gamma on [0, 1] has variance u / ((u + 1)^2 (u + 2)), u = gamma + 1 (Karras et al.
    2024, Eq. 123), which falls from 1/12 at gamma = 0. Above the root the equation for u is convex and
    rising, and 1 / width lies above it, so every iterate does.
    """
    inverse = width**-2
    u = 1.0 / width
    for _ in range(NEWTON_STEPS):
        u -= ((u + 1) ** 2 * (u + 2) - u * inverse) / ((u + 1) * (3 * u + 5) - inverse)
    return u - 1.0


def profile_products(first: Sequence[Profile], second: Sequence[Profile]) -> Matrix:
    """The inner products of profiles, as functions of time, float64.

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]; the integral of the product of two ends
    at the earlier t. Written in the ratio of both, so that nothing overflows.
    """
    t, gamma = (values[:, None] for values in _parameters(first))
    u, delta = (values[None, :] for values in _parameters(second))
    early, late = np.minimum(t, u), np.maximum(t, u)
    of_late = np.where(t > u, gamma, delta)
    scale = (gamma + 1) * (delta + 1) / (gamma + delta + 1)
    return scale * (early / late) ** (of_late + 1) / early


def reconstruction(
    kept: Sequence[Profile], wanted: Sequence[Profile], stored: str
) -> list[Reconstruction]:
    """How the wanted averages follow from the kept ones, by least squares on the profiles.

    (Karras et al. 2024, Alg. 3), with two additions: the coefficients add up to 1, so that weights
    which did not change come out exactly, and the rounding of the stored averages counts as an error
    too (a ridge), which bounds the condition number.

    Args:
        kept: the profiles that there are; all different.
        wanted: those to make.
        stored: the format of the kept averages, a key of `ROUNDING`.
    """
    gram, products = profile_products(kept, kept), profile_products(kept, wanted)
    norms = np.sqrt(np.diag(gram))[:, None]
    wanted_norms = np.array([profile_products([one], [one])[0, 0] for one in wanted]) ** 0.5
    scaled, aims = gram / norms / norms.T, products / norms / wanted_norms
    ridge = max(RIDGE, (ROUNDING[stored] / MOTION) ** 2)
    sums = 1.0 / norms  # of a normalised profile's integral
    solved = np.linalg.solve(scaled + ridge * np.eye(len(kept)), np.hstack([aims, sums]))
    free, along = solved[:, :-1], solved[:, -1:]
    missing = 1.0 / wanted_norms - (sums * free).sum(0)
    solution = free + along * missing / (sums * along).sum(0)
    left = 1.0 - 2.0 * (solution * aims).sum(0) + (solution * (scaled @ solution)).sum(0)
    coefficients = solution * wanted_norms / norms
    return [
        Reconstruction(
            coefficients[:, index],
            float(max(left[index], 0.0)) ** 0.5,
            ROUNDING[stored] * float(np.linalg.norm(coefficients[:, index])),
        )
        for index in range(len(wanted))
    ]


def _parameters(profiles: Iterable[Profile]) -> tuple[Vector, Vector]:
    steps, widths = zip(*profiles, strict=True)
    known = {width: exponent(width) for width in set(widths)}
    return np.array(steps, np.float64), np.array([known[width] for width in widths])
