"""ER-SDE-Solver: a reverse SDE with the amount of noise as a free function (Cui et al. 2023)."""

import numpy as np

from ldmkit.diffusion.samplers.stepping import (
    DenoiseAt,
    Levels,
    OnStep,
    at,
    gauss_rule,
    require_order,
    steps_of,
    towards,
)
from ldmkit.tensors import Latents, Noise

POWER, OFFSET = 0.3, 10.0


def sample_er_sde(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    order: int = 3,
    s_noise: float = 1.0,
    on_step: OnStep | None = None,
) -> Latents:
    """ER-SDE-Solver with phi(sigma) = sigma (exp(sigma^0.3) + 10) (Cui et al. 2023, Alg. 1 to 3, ER-SDE 5).

    One model call a step; first steps are of the order that their history allows. The derivatives of the
    clean latents in sigma are those of the polynomial through the history at its newest point: where the
    published code takes the slope between the two newest, which belongs halfway between them, the third
    order would only be a second.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise, called for each step but the last.
        order: how many steps are looked back on, this one included; 1 to 3.
        s_noise: factor on fresh noise.
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: there is no such order.
    """
    require_order(order, 3)
    history: list[tuple[Latents, float]] = []
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        history = [(clean, level), *history[: order - 1]]
        if following == 0.0:
            x = clean
        else:
            kept = float(_phi(np.float64(following)) / _phi(np.float64(level)))
            x = towards(clean, x, kept)
            for factor, derivative in zip(
                _factors(level, following), _derivatives(history), strict=False
            ):
                x = x + factor * derivative
            up = max(following**2 - (kept * level) ** 2, 0.0) ** 0.5
            x = x + s_noise * up * noise(x)
        if on_step is not None:
            on_step(step, clean)
    return x


def _phi(sigma: np.ndarray | np.float64) -> np.ndarray:
    return np.asarray(sigma * (np.exp(sigma**POWER) + OFFSET))


def _factors(level: float, following: float) -> tuple[float, float]:
    """What the first and the second derivative of the clean latents contribute to a step (Eq. 20, 21)."""
    end = float(_phi(np.float64(following)))
    # in log sigma, where phi is smooth over the many magnitudes that a step may span
    places, weights = gauss_rule(np.log(following), np.log(level))
    points = np.exp(places)
    damped = weights * points / _phi(points)
    whole = following - level
    first = whole + end * float(damped.sum())
    return first, whole**2 / 2.0 + end * float(damped @ (points - level))


def _derivatives(history: list[tuple[Latents, float]]) -> list[Latents]:
    """First and second derivative at the newest point, as far as history goes."""
    if len(history) < 2:
        return []
    (clean, level), (former, former_level), *older = history
    slope = (clean - former) / (level - former_level)
    if not older:
        return [slope]
    oldest, oldest_level = older[0]
    former_slope = (former - oldest) / (former_level - oldest_level)
    bend = (slope - former_slope) / (level - oldest_level)
    return [slope + (level - former_level) * bend, 2.0 * bend]
