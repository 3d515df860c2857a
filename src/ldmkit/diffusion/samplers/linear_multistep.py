"""Samplers that extrapolate the noise expected, n = (x - clean) / sigma, from earlier steps: PLMS, LMS, DEIS.

All of them integrate dx = n dsigma. The integral is written as the first-order step plus a sum over
differences of n: so no digits are lost where x is large.
"""

import math

import numpy as np

from ldmkit.diffusion.samplers.euler import heun_step
from ldmkit.diffusion.samplers.stepping import (
    DenoiseAt,
    Levels,
    OnStep,
    at,
    lagrange_integrals,
    require_order,
    steps_of,
    towards,
)
from ldmkit.tensors import Latents, Noise

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sample_plms(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    calls: int | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """PLMS (Liu et al. 2022, Alg. 2 with Eq. 12; the LDM code's), of order 2.

    The noise expected is extrapolated by Adams and Bashforth's rule of order 4 for even steps, whatever
    the grid, then followed as in DDIM. One model call a step, and two in the first (a pseudo Heun
    step), so that the grid is meant to be even in t.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: never called.
        calls: model calls to make: steps, or steps + 1 (the default for more than one step).
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: so many calls do not go with the grid.
    """
    steps = len(sigmas) - 1
    most = steps + int(steps > 1)
    if calls is not None and calls not in (steps, most):
        raise ValueError(f"{calls} model calls asked for; {steps} steps take {steps} or {most}")
    slopes: list[Latents] = []
    for step, level, following in steps_of(sigmas):
        if step == 0:
            start = x
            x, clean = heun_step(denoise, x, level, following, corrected=calls in (None, most))
            slopes = [(start - clean) / level]
        else:
            clean = at(denoise, x, level)
            slopes = [(x - clean) / level, *slopes[:3]]
            weights = ADAMS_BASHFORTH[len(slopes)]
            x = _moved(
                clean, slopes, [(following - level) * weight for weight in weights], following
            )
        if on_step is not None:
            on_step(step, clean)
    return x


def sample_lms(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    order: int = 4,
    on_step: OnStep | None = None,
) -> Latents:
    """Adams and Bashforth's rule for the steps as they are: a polynomial in sigma; one model call a step.

    k-diffusion's LMS. The first steps are of the order that their history allows.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: never called.
        order: how many steps are looked back on, this one included; 1 to 4.
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: there is no such order.
    """
    require_order(order, 4)
    slopes: list[Latents] = []
    nodes: list[float] = []
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        slopes = [(x - clean) / level, *slopes[: order - 1]]
        nodes = [level, *nodes[: order - 1]]
        x = _moved(clean, slopes, lagrange_integrals(nodes, level, following), following)
        if on_step is not None:
            on_step(step, clean)
    return x


def sample_deis(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    order: int = 3,
    on_step: OnStep | None = None,
) -> Latents:
    """DEIS (Zhang and Chen 2023), a polynomial in log sigma; one model call a step.

    The first steps are of the order that their history allows; the last, to 0, where log sigma has no
    value, takes the clean latents expected.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: never called.
        order: how many steps are looked back on, this one included; 1 to 3.
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: there is no such order.
    """
    require_order(order, 3)
    slopes: list[Latents] = []
    nodes: list[float] = []
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        slopes = [(x - clean) / level, *slopes[: order - 1]]
        nodes = [math.log(level), *nodes[: order - 1]]
        if following > 0.0:
            weights = lagrange_integrals(nodes, nodes[0], math.log(following), np.exp)
            x = _moved(clean, slopes, weights, following)
        else:
            x = towards(clean, x, 0.0)
        if on_step is not None:
            on_step(step, clean)
    return x


def _moved(
    clean: Latents, slopes: list[Latents], weights: list[float], following: float
) -> Latents:
    """The sum of x and of weights times slopes, for weights whose sum is `following` - level."""
    x = clean + following * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        x = x + weight * (slope - slopes[0])
    return x
