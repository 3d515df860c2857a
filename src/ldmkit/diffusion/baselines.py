"""What the loss of a model that has learnt must stay below: two predictors in closed form.

Both are computed for latents of mean 0 and variance 1 (whitened) and for noise without offset or
perturbation. For l2 that is all that is assumed; for l1 and huber the latents are taken as Gaussian.
"""

import math
from collections.abc import Callable

import torch

from ldmkit.diffusion.parameterization import Parameterization
from ldmkit.diffusion.weighting import relative_weight
from ldmkit.diffusion_configs import ObjectiveConfig
from ldmkit.tensors import Sigmas


def zero_loss(sigma: Sigmas, parameterization: Parameterization, config: ObjectiveConfig) -> Sigmas:
    """Expected loss of the denoiser that always answers 0, whose error of clean latents is 1."""
    return _loss_of_variance(torch.ones_like(sigma), sigma, parameterization, config)


def linear_loss(
    sigma: Sigmas, parameterization: Parameterization, config: ObjectiveConfig
) -> Sigmas:
    """Expected loss of the best linear denoiser, x / (1 + sigma^2).

    Its error of clean latents is sigma^2 / (1 + sigma^2). It knows nothing but the variance, and is the
    best of all denoisers if the latents are white Gaussian noise: a model below it has learnt
    something about the data.
    """
    square = sigma.square()
    return _loss_of_variance(square / (1.0 + square), sigma, parameterization, config)


def _loss_of_variance(
    variance: Sigmas, sigma: Sigmas, parameterization: Parameterization, config: ObjectiveConfig
) -> Sigmas:
    """Of errors of clean latents with this variance."""
    predicted = variance / parameterization(sigma).c_out.square()
    expected = EXPECTED[config.loss](predicted, config)
    return expected * relative_weight(sigma, parameterization, config)


def _expected_l2(variance: Sigmas, config: ObjectiveConfig) -> Sigmas:
    return variance


def _expected_l1(variance: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """E|e| of a Gaussian."""
    return (2.0 / math.pi * variance).sqrt()


def _expected_huber(variance: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """2c (E sqrt(e^2 + c^2) - c) of a Gaussian.

    With z = c^2 / 4v the root's mean is c^2 / sqrt(8 pi v) exp(z) (K_0(z) + K_1(z)), K the modified
    Bessel functions.
    """
    c, v = config.huber_c, variance.double()
    z = c**2 / (4.0 * v)
    bessel = torch.special.scaled_modified_bessel_k0(z) + torch.special.scaled_modified_bessel_k1(z)
    root = c**2 / (8.0 * math.pi * v).sqrt() * bessel
    return (2.0 * c * (root - c)).to(variance.dtype)


EXPECTED: dict[str, Callable[[Sigmas, ObjectiveConfig], Sigmas]] = {
    "l2": _expected_l2,
    "l1": _expected_l1,
    "huber": _expected_huber,
}
"""Mean of each distance for a Gaussian error of this variance: one for each of `objective.LOSSES`."""
