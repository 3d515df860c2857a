"""Is it learning? The denoising loss beside that of two denoisers which have learnt nothing.

All three see the very same noisy latents, and their errors have the same weights. `zero` is a network
whose output is zero, as it is before the first step; `linear` the best denoiser that is linear: for
latents of mean 0 and variance 1 in each channel E[x y] / E[y^2] y = y / (1 + sigma^2), y = x + sigma n
(Wiener's filter without memory). A model whose loss is not below `linear` has learnt no more than that
the latents are whitened.
"""

from typing import Any, NamedTuple

from ldmkit.diffusion.denoiser import Denoise
from ldmkit.diffusion.objective import denoising_loss
from ldmkit.diffusion.parameterization import Parameterization
from ldmkit.diffusion_configs import ObjectiveConfig
from ldmkit.tensors import Latents, Sigmas


class ComparedLosses(NamedTuple):
    """Losses of each sample."""

    model: Sigmas
    linear: Sigmas
    zero: Sigmas


def compared_losses(
    denoise: Denoise,
    parameterization: Parameterization,
    latents: Latents,
    sigma: Sigmas,
    noise: Latents,
    condition: Any,  # noqa: ANN401 - opaque to the mathematics
    config: ObjectiveConfig,
) -> ComparedLosses:
    """The loss of each sample under the objective, for the model and for both that learnt nothing.

    Args:
        denoise: the model.
        parameterization: of the model.
        latents: whitened, `[b, z, y, x]`.
        sigma: noise level of each sample.
        noise: of unit variance, `[b, z, y, x]`.
        condition: of each sample.
        config: the objective; offset noise and input perturbation are left out.
    """
    plain = config.model_copy(update={"offset_noise": 0.0, "input_perturbation": 0.0})

    def zero(x: Latents, sigma: Sigmas, condition: Any) -> Latents:  # noqa: ANN401
        return parameterization(sigma).c_skip.view(-1, 1, 1, 1) * x

    losses = (
        denoising_loss(one, parameterization, latents, sigma, lambda like: noise, condition, plain)
        for one in (denoise, linear_denoise, zero)
    )
    return ComparedLosses(*losses)


def linear_denoise(x: Latents, sigma: Sigmas, condition: Any) -> Latents:  # noqa: ANN401
    """The linear denoiser with the least squared error, for whitened latents; a `Denoise`."""
    return x / (1.0 + sigma.square()).view(-1, 1, 1, 1)
