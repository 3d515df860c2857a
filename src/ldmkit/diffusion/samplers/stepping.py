"""What every sampler is made of: the loop's types, a model call at one noise level, integrals of history."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Latents, Sigmas

DenoiseAt = Callable[[Latents, Sigmas], Latents]
"""A `Denoise` whose condition is settled."""
OnStep = Callable[[int, Latents], None]
"""Called after each step with its number and the clean latents expected at its start."""
Levels = Float[Tensor, " steps_plus_1"]
"""Falling noise levels, the last one 0."""

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(16)
"""A Gauss-Legendre rule: exact for polynomials, and to rounding for what is smooth here."""


def steps_of(sigmas: Levels) -> Iterator[tuple[int, float, float]]:
    """Number, level and following level of each step; numbers of Python's, hence float64."""
    for step, (level, following) in enumerate(itertools.pairwise(sigmas.tolist())):
        yield step, level, following


def at(denoise: DenoiseAt, x: Latents, level: float) -> Latents:
    """One model call with the whole batch at one noise level."""
    return denoise(x, x.new_full((len(x),), level))


def towards(clean: Latents, x: Latents, kept: float) -> Latents:
    """`clean` with the share `kept` of the noise that is left in `x`.

    Written so because kept x + (1 - kept) clean would lose the digits of `clean` at large noise.
    """
    return clean + kept * (x - clean)


def require_order(order: int, most: int) -> None:
    """Raise ValueError where a multistep method has no such order."""
    if not 1 <= order <= most:
        raise ValueError(f"order {order} asked for; take 1 to {most}")


def log_ratio(level: float, following: float) -> float:
    """Half of a step in log-SNR, ln(level / following): h in the papers."""
    return math.log(level / following)


def gauss_rule(start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Points from `start` to `end` and their weights in an integral of a smooth function."""
    half = (end - start) / 2.0
    return start + half * (POINTS + 1.0), half * WEIGHTS


def lagrange_integrals(
    nodes: Sequence[float],
    start: float,
    end: float,
    density: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> list[float]:
    """How much each node counts in the integral of the polynomial through all nodes, times `density`."""
    points, weights = gauss_rule(start, end)
    weights = weights * density(points)
    counts = []
    for place, node in enumerate(nodes):
        others = np.array([*nodes[:place], *nodes[place + 1 :]])[:, None]
        counts.append(float(weights @ np.prod((points - others) / (node - others), axis=0)))
    return counts
