"""The loss of the first stage (Rombach et al. 2022, App. G; sums over a picture, means over a batch)."""

from typing import NamedTuple

import torch
from torch import nn

from ldmkit.autoencoder.discriminator import adaptive_weight, adversarial_loss
from ldmkit.autoencoder.perceptual import PerceptualDistance
from ldmkit.autoencoder.posterior import GaussianPosterior
from ldmkit.configs import AutoencoderLossConfig
from ldmkit.tensors import Images, Scalar


class GeneratorLoss(NamedTuple):
    """The terms of the autoencoder's loss, each a scalar; `total` is what is minimised."""

    total: Scalar
    pixel: Scalar
    """L1, mean over all values."""
    perceptual: Scalar
    """Perceptual distance, mean over the batch."""
    kl: Scalar
    """KL divergence of one picture's posterior, nats."""
    adversarial: Scalar
    adaptive: Scalar
    """The adaptive weight of the adversarial term; 0 while the discriminator does not count."""


def generator_loss(
    images: Images,
    reconstructions: Images,
    posterior: GaussianPosterior,
    config: AutoencoderLossConfig,
    *,
    perceptual: PerceptualDistance | None,
    discriminator: nn.Module | None,
    last_layer: torch.Tensor,
) -> GeneratorLoss:
    """sum(|x - y| + w_p d(x, y)) / B + w_kl KL + w_d lambda g.

    Args:
        images: what was shown, `[b, c, h, w]` in [-1, 1].
        reconstructions: what came back.
        posterior: of the images.
        config: the weights.
        perceptual: distance network, or None for L1 alone.
        discriminator: or None while it does not count; then nothing of it is computed.
        last_layer: weight of the decoder's last convolution, for the adaptive weight.
    """
    pixels = images[0].numel()
    pixel = (images - reconstructions).abs().mean()
    zero = torch.zeros((), device=images.device)
    distance = perceptual(images, reconstructions).mean() if perceptual else zero
    # d is broadcast over the values of its picture before the sum, as in the paper's code
    reconstruction = pixels * (pixel + config.perceptual_weight * distance)
    kl = posterior.penalty()
    total = reconstruction + config.kl_weight * kl
    if discriminator is None:
        return GeneratorLoss(total, pixel, distance, kl, zero, zero)
    adversarial = adversarial_loss(discriminator(reconstructions))
    adaptive = adaptive_weight(reconstruction, adversarial, last_layer)
    total = total + config.disc_weight * adaptive * adversarial
    return GeneratorLoss(total, pixel, distance, kl, adversarial, adaptive)
