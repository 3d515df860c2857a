"""DPM-Solver++: steps that are exact for clean latents polynomial in log sigma (Lu et al. 2022)."""

import math

from ldmkit.diffusion.samplers.stepping import (
    DenoiseAt,
    Levels,
    OnStep,
    at,
    log_ratio,
    steps_of,
    towards,
)
from ldmkit.tensors import Latents, Noise


def sample_dpmpp_2s(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Latents:
    """DPM-Solver++(2S), single-step of order 2 (Lu et al. 2022, Alg. 1), one model call a level.

    A step spans two levels of the grid and has its middle evaluation at the one between, so that the
    network is asked at no other. A level left over, and the step to 0, are of order 1.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: never called.
        on_step: called after each level with its number and the clean latents expected.
    """
    start, first, begin = x, x, 0.0
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        if step % 2 == 1 and following > 0.0:
            span = log_ratio(begin, following) / (2.0 * log_ratio(begin, level))
            x = towards(first + span * (clean - first), start, following / begin)
        else:
            start, first, begin = x, clean, level
            x = towards(clean, x, following / level)
        if on_step is not None:
            on_step(step, clean)
    return x


def sample_dpmpp_2m(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Latents:
    """DPM-Solver++(2M), multistep of order 2 (Lu et al. 2022, Alg. 2), one model call a step.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: never called.
        on_step: called after each step with its number and the clean latents expected.
    """
    return sample_dpmpp_2m_sde(denoise, x, sigmas, noise=noise, eta=0.0, on_step=on_step)


def sample_dpmpp_2m_sde(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    on_step: OnStep | None = None,
) -> Latents:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, Eq. 18; the midpoint rule), one model call a step.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise, called for each step but the last; not for eta 0.
        eta: 1 is the reverse SDE of the process, 0 its ODE.
        s_noise: factor on fresh noise.
        on_step: called after each step with its number and the clean latents expected.
    """
    former, former_h = x, 0.0
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        if following == 0.0:
            x = clean
        else:
            h = log_ratio(level, following)
            middle = clean + h / (2.0 * former_h) * (clean - former) if step > 0 else clean
            x = towards(middle, x, (following / level) ** (1.0 + eta))
            x = _refreshed(x, following, h, eta, s_noise, noise)
            former, former_h = clean, h
        if on_step is not None:
            on_step(step, clean)
    return x


def sample_dpmpp_3m_sde(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    on_step: OnStep | None = None,
) -> Latents:
    """SDE-DPM-Solver++(3M): the same with two derivatives, one model call a step.

    Lu et al. 2022 extended as in k-diffusion, but for a factor: there the second divided difference,
    which is half of a second derivative, counts as one, and the ODE (eta 0) is solved with order 2; here
    with order 3. With noise the order is 2 for both, the error about half as large here.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise, called for each step but the last; not for eta 0.
        eta: 1 is the reverse SDE of the process, 0 its ODE.
        s_noise: factor on fresh noise.
        on_step: called after each step with its number and the clean latents expected.
    """
    history: list[tuple[Latents, float]] = []
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        if following == 0.0:
            x = clean
        else:
            h = log_ratio(level, following)
            x = towards(clean, x, (following / level) ** (1.0 + eta))
            x = _with_derivatives(x, clean, history, h, (1.0 + eta) * h)
            x = _refreshed(x, following, h, eta, s_noise, noise)
            history = [(clean, h), *history[:1]]
        if on_step is not None:
            on_step(step, clean)
    return x


def _with_derivatives(
    x: Latents, clean: Latents, history: list[tuple[Latents, float]], h: float, whole: float
) -> Latents:
    """Adds what one or two derivatives of the clean latents in log sigma, from history, contribute.

    `whole` is the exponent by which the step damps x; phi_2 and phi_3 are functions of it.
    """
    if not history:
        return x
    phi_2 = math.expm1(-whole) / whole + 1.0
    (former, former_h), *older = history
    slope = (clean - former) * (h / former_h)
    if not older:
        return x + phi_2 * slope
    oldest, oldest_h = older[0]
    bend = (slope - (former - oldest) * (h / oldest_h)) * (h / (former_h + oldest_h))
    slope = slope + bend * (former_h / h)
    return x + phi_2 * slope + (1.0 - 2.0 * phi_2 / whole) * bend


def _refreshed(
    x: Latents, following: float, h: float, eta: float, s_noise: float, noise: Noise
) -> Latents:
    if eta == 0.0:
        return x
    return x + s_noise * following * (-math.expm1(-2.0 * eta * h)) ** 0.5 * noise(x)
