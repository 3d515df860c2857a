"""The denoising loss (Ho et al. 2020; Karras et al. 2022, Eq. 2)."""

from collections.abc import Callable
from typing import Any

from ldmkit.diffusion.denoiser import Denoise
from ldmkit.diffusion.parameterization import Parameterization
from ldmkit.diffusion.weighting import relative_weight
from ldmkit.diffusion_configs import ObjectiveConfig
from ldmkit.tensors import Latents, Noise, Sigmas


def denoising_loss(
    denoise: Denoise,
    parameterization: Parameterization,
    latents: Latents,
    sigma: Sigmas,
    noise: Noise,
    condition: Any,  # noqa: ANN401 - opaque to the mathematics
    config: ObjectiveConfig,
) -> Sigmas:
    """The loss of each sample: distance of the network's prediction from its target, weighted by level.

    The error of the clean latents divided by c_out is that of the prediction. For epsilon, l2 and
    `simple` that is the paper's L_simple, the mean squared error of the predicted noise.

    Args:
        denoise: see `denoiser`.
        parameterization: the one inside `denoise`.
        latents: whitened, `[b, z, y, x]`.
        sigma: noise level of each sample.
        noise: source of unit noise.
        condition: of each sample.
        config: distance, weighting, offset noise and input perturbation.
    """
    level = sigma.view(-1, 1, 1, 1)
    unit = noise(latents)
    if config.offset_noise:  # Guttenberg 2023: a share of the noise that shifts whole channels
        unit = unit + config.offset_noise * noise(latents[:, :, :1, :1])
    noisy, goal = latents + level * unit, latents
    scaling = parameterization(sigma)
    if config.input_perturbation:
        # Ning et al. 2023: the network sees more noise than its target knows of. What the skip
        # connection carries of it is no error of the prediction.
        extra = config.input_perturbation * level * noise(latents)
        noisy, goal = noisy + extra, goal + scaling.c_skip.view(-1, 1, 1, 1) * extra
    error = denoise(noisy, sigma, condition) - goal
    losses = LOSSES[config.loss](error, scaling.c_out, config)
    return losses * relative_weight(sigma, parameterization, config)


def l2(error: Latents, c_out: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """Mean square of the prediction's error."""
    return error.square().mean(dim=(1, 2, 3)) / c_out.square()


def l1(error: Latents, c_out: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """Mean absolute error of the prediction."""
    return error.abs().mean(dim=(1, 2, 3)) / c_out.abs()


def huber(error: Latents, c_out: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """Mean of 2c (sqrt(e^2 + c^2) - c), e the prediction's error (pseudo-Huber, Charbonnier et al. 1997).

    e^2 where e is small against c, 2c |e| where it is large.
    """
    c = config.huber_c
    square = (error / c_out.view(-1, 1, 1, 1)).square()
    # The difference of two close roots, written so that nothing cancels.
    return (2.0 * c * square / ((square + c**2).sqrt() + c)).mean(dim=(1, 2, 3))


LOSSES: dict[str, Callable[[Latents, Sigmas, ObjectiveConfig], Sigmas]] = {
    "l2": l2,
    "l1": l1,
    "huber": huber,
}
"""Keep in step with `diffusion_configs.LossKind`; a test compares them."""
