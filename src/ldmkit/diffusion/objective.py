"""The denoising loss (Ho et al. 2020; Karras et al. 2022, Eq. 2)."""

from typing import Any

from ldmkit.diffusion.denoiser import Denoise
from ldmkit.diffusion.parameterization import Parameterization
from ldmkit.tensors import Latents, Noise, Sigmas


def denoising_loss(
    denoise: Denoise,
    parameterization: Parameterization,
    latents: Latents,
    sigma: Sigmas,
    noise: Noise,
    condition: Any,  # noqa: ANN401 - opaque to the mathematics
) -> Sigmas:
    """Mean squared error of each sample's clean latents, weighted by 1 / c_out^2.

    For epsilon that is the paper's L_simple, the mean squared error of the predicted noise.

    Args:
        denoise: see `denoiser`.
        parameterization: the one inside `denoise`.
        latents: whitened, `[b, z, y, x]`.
        sigma: noise level of each sample.
        noise: source of unit noise.
        condition: of each sample.
    """
    noisy = latents + sigma.view(-1, 1, 1, 1) * noise(latents)
    error = (denoise(noisy, sigma, condition) - latents).square().mean(dim=(1, 2, 3))
    return error / parameterization(sigma).c_out.square()
