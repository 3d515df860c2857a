"""`denoise(x, sigma, condition) -> clean latents`: the one interface of the mathematics."""

from collections.abc import Callable
from typing import Any

from ldmkit.diffusion.parameterization import Parameterization
from ldmkit.diffusion.schedule import Schedule
from ldmkit.tensors import Latents, Sigmas

Denoise = Callable[[Latents, Sigmas, Any], Latents]
"""Noisy latents, their noise level, a condition (opaque here) -> the clean latents expected."""


def denoiser(
    network: Callable[[Latents, Sigmas, Any], Latents],
    schedule: Schedule,
    parameterization: Parameterization,
) -> Denoise:
    """A network of (scaled latents, time input, condition) as a `Denoise`."""

    def denoise(x: Latents, sigma: Sigmas, condition: Any) -> Latents:  # noqa: ANN401
        scaling = parameterization(sigma)
        c_skip, c_out, c_in = (number.view(-1, 1, 1, 1) for number in scaling)
        prediction = network(c_in * x, schedule.timestep(sigma), condition)
        return c_skip * x + c_out * prediction.float()

    return denoise
