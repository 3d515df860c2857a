"""The rate of a denoiser: how many bits it takes to hand over latents down to a noise level.

Progressive coding (Ho et al. 2020, Sec. 4.3) sends x at ever less noise; each step costs the KL divergence
between where the encoder puts it and where the decoder expects it. With steps as fine as one likes the sum is

    R(sigma) = KL(q(x_top) || N(0, 1 + top^2)) + 1/2 integral of |x - D(x_s; s)|^2 d(s^-2), s from top to sigma

(Kingma et al. 2021, Eq. 15), in nats for a sample. Nothing but mean squared errors at some levels is needed.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.diffusion.samplers import Levels
from ldmkit.tensors import Latents

Errors = Float[Tensor, "batch levels"]


def cumulated_rate(errors: Errors, sigmas: Levels) -> Errors:
    """What it costs to come from the noisiest level down to each level, nats for a sample.

    The integrand, |x - D|^2 / s^2 for each unit of ln s, is taken to be straight between levels.

    Args:
        errors: |x - D(x + s n; s)|^2, summed over a sample, at each level.
        sigmas: falling noise levels, all above 0.

    Returns:
        Rates in float64, 0 at the first level; see `prior_rate` for what comes before.

    Raises:
        ValueError: the levels do not fall, or are not as many as the errors.
    """
    if (
        len(sigmas) != errors.shape[1]
        or float(sigmas.min()) <= 0
        or bool((sigmas.diff() >= 0).any())
    ):
        raise ValueError("a rate needs noise levels that fall, above 0, one for each error")
    levels = sigmas.double().to(errors.device)
    density = errors.double() / levels.square()
    pieces = (density[:, 1:] + density[:, :-1]) / 2.0 * -levels.log().diff()
    return torch.cat([pieces.new_zeros(len(pieces), 1), pieces.cumsum(1)], dim=1)


def prior_rate(latents: Latents, top: float) -> Float[Tensor, " batch"]:
    """KL divergence of latents with noise of level `top` to N(0, 1 + top^2), nats for a sample.

    Args:
        latents: whitened.
        top: the noisiest level.
    """
    square = latents.double().flatten(1).square()
    variance = 1.0 + top**2
    per_value = math.log1p(top**-2) + (top**2 + square) / variance - 1.0
    return 0.5 * per_value.sum(1)
