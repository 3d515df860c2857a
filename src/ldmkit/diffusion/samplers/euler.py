"""Euler's and Heun's method on the probability-flow ODE dx/dsigma = (x - clean) / sigma, with churn."""

import math
from typing import NamedTuple

from ldmkit.diffusion.samplers.stepping import DenoiseAt, Levels, OnStep, at, steps_of, towards
from ldmkit.diffusion.schedule import PURE_NOISE
from ldmkit.tensors import Latents, Noise

MOST_CHURN = math.sqrt(2.0) - 1.0


class Churn(NamedTuple):
    """Noise added before a step, so that the step removes more than it must (Karras et al. 2022, Alg. 2).

    Attributes:
        s_churn: how much, over all steps together; 0 is none.
        s_tmin, s_tmax: the noise levels between which it is added.
        s_noise: factor on the noise; slightly above 1 makes up for detail lost by the network.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0


NO_CHURN = Churn()


def sample_euler(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    churn: Churn = NO_CHURN,
    on_step: OnStep | None = None,
) -> Latents:
    """Euler's method (Karras et al. 2022), one model call a step; without churn it is DDIM.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise; not called without churn.
        churn: noise added before steps.
        on_step: called after each step with its number and the clean latents expected.
    """
    for step, level, following in steps_of(sigmas):
        x, level = churned(x, level, churn, len(sigmas) - 1, noise)
        clean = at(denoise, x, level)
        x = towards(clean, x, following / level)
        if on_step is not None:
            on_step(step, clean)
    return x


def sample_heun(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    churn: Churn = NO_CHURN,
    calls: int | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """Heun's method of order 2 (Karras et al. 2022, Alg. 1 and 2), two model calls a step.

    The last step, to 0, has one. Where fewer calls are asked for, as an even number of them must, the
    first steps have one too: there the clean latents hardly change.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise; not called without churn.
        churn: noise added before steps.
        calls: model calls to make, steps to 2 steps - 1 (the default).
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: so many calls do not go with the grid.
    """
    steps = len(sigmas) - 1
    plain = uncorrected(sigmas, calls)
    for step, level, following in steps_of(sigmas):
        x, level = churned(x, level, churn, steps, noise)
        x, clean = heun_step(denoise, x, level, following, corrected=step >= plain)
        if on_step is not None:
            on_step(step, clean)
    return x


def heun_step(
    denoise: DenoiseAt, x: Latents, level: float, following: float, *, corrected: bool
) -> tuple[Latents, Latents]:
    """One step and the clean latents expected at its start; a step to 0 is never corrected.

    The correction averages the slope at both ends. From pure noise (sigma 1e6 stands for infinity) the
    slope changes by next to nothing over nearly the whole way; there the clean latents are averaged,
    which is the same rule with 1 / sigma for the variable.
    """
    clean = at(denoise, x, level)
    there = towards(clean, x, following / level)
    if not corrected or following == 0.0:
        return there, clean
    again = at(denoise, there, following)
    if level >= PURE_NOISE:
        return towards((clean + again) / 2.0, x, following / level), clean
    turn = (there - again) / following - (x - clean) / level
    return there + (following - level) / 2.0 * turn, clean


def churned(
    x: Latents, level: float, churn: Churn, steps: int, noise: Noise
) -> tuple[Latents, float]:
    """The latents with fresh noise, and the level they have then."""
    if churn.s_churn <= 0.0 or not churn.s_tmin <= level <= churn.s_tmax:
        return x, level
    raised = level * (1.0 + min(churn.s_churn / steps, MOST_CHURN))
    return x + churn.s_noise * (raised**2 - level**2) ** 0.5 * noise(x), raised


def uncorrected(sigmas: Levels, calls: int | None) -> int:
    """How many of the first steps must do with one model call."""
    steps = len(sigmas) - 1
    most = 2 * steps - int(sigmas[-1] == 0)
    if calls is not None and not steps <= calls <= most:
        raise ValueError(f"{calls} model calls asked for; {steps} steps take {steps} to {most}")
    return 0 if calls is None else most - calls
