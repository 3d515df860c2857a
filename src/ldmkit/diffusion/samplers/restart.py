"""Restart sampling: noise again in the middle of an ODE, and down again (Xu et al. 2023)."""

import itertools

from ldmkit.diffusion.samplers.euler import heun_step, sample_heun
from ldmkit.diffusion.samplers.stepping import DenoiseAt, Levels, OnStep
from ldmkit.tensors import Latents, Noise

RHO = 7.0
SAME = 1e-3
"""A level this close to the end of the restart interval (relatively) is that end."""


def sample_restart(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    interval: tuple[float, float] = (0.1, 2.0),
    repeats: int = 2,
    calls: int | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """Restart sampling (Xu et al. 2023, Alg. 1) with Heun's steps.

    Down to the interval's end, which is added to the levels; then `repeats` times fresh noise up to its
    beginning, and down again on a grid of its own, even in sigma^(1/7); then on to 0. The restarts share
    the calls that Heun's method on the levels does not take; where a share is odd, its first step is
    Euler's. With no calls to spare it is `sample_heun`.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise, called once for each restart.
        interval: noise levels between which the way is repeated, least first.
        repeats: how often, at most, at least 1.
        calls: model calls to make, at least one a step (default: as many for the restarts as without).
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: fewer calls than steps, or an interval outside the grid's levels.
    """
    least, most = interval
    levels = sigmas.tolist()
    if not 0.0 < least < most <= levels[0]:
        raise ValueError(
            f"restart interval {least:g} to {most:g}: take one between 0 and {levels[0]:g}"
        )
    kept = [level for level in levels if abs(level / least - 1.0) > SAME]
    main = sorted([*kept, least], reverse=True)
    plain = 2 * (len(main) - 1) - 1
    calls = 2 * plain if calls is None else calls
    if calls <= plain:
        few = calls < 2 * (len(sigmas) - 1)
        grid = sigmas if few else sigmas.new_tensor(main)
        return sample_heun(denoise, x, grid, noise=noise, calls=calls, on_step=on_step)

    ways = _ways(main, interval, calls - plain, repeats)
    step = 0
    for place, (way, uncorrected) in enumerate(ways):
        if 0 < place < len(ways) - 1:
            x = x + (most**2 - least**2) ** 0.5 * noise(x)
        for number, (level, following) in enumerate(itertools.pairwise(way)):
            x, clean = heun_step(denoise, x, level, following, corrected=number >= uncorrected)
            if on_step is not None:
                on_step(step, clean)
            step += 1
    return x


def _ways(
    main: list[float], interval: tuple[float, float], spare: int, repeats: int
) -> list[tuple[list[float], int]]:
    """Levels of each way down, and how many of its first steps are Euler's."""
    least, most = interval
    there = main.index(least)
    shares = [spare // repeats + int(number < spare % repeats) for number in range(repeats)]
    restarts = [(_way_down(most, least, (share + 1) // 2), share % 2) for share in shares if share]
    return [(main[: there + 1], 0), *restarts, (main[there:], 0)]


def _way_down(most: float, least: float, steps: int) -> list[float]:
    start, end = most ** (1.0 / RHO), least ** (1.0 / RHO)
    inner = [(start + (end - start) * step / steps) ** RHO for step in range(1, steps)]
    return [most, *inner, least]
