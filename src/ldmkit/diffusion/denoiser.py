"""`denoise(x, sigma, condition) -> clean latents`: the one interface of the mathematics."""

from collections.abc import Callable
from typing import Any

import torch

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


def guided(denoise: Denoise, weight: float) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2021) behind the same interface.

    clean = null + weight (conditional - null), both from one call on a doubled batch. The condition
    given to the result must hold the conditional rows first and as many null rows behind them.
    """

    def guided_denoise(x: Latents, sigma: Sigmas, condition: Any) -> Latents:  # noqa: ANN401
        both = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), condition)
        conditional, null = both.chunk(2)
        return null + weight * (conditional - null)

    return guided_denoise
