"""The loss of the first stage (Rombach et al. 2022, App. G; Esser et al. 2021)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ldmkit.autoencoder.codebook import QuantizedPosterior
from ldmkit.autoencoder.discriminator import adaptive_weight, adversarial_loss
from ldmkit.autoencoder.perceptual import PerceptualDistance
from ldmkit.autoencoder.posterior import Posterior
from ldmkit.autoencoder_configs import AutoencoderLossConfig
from ldmkit.tensors import Images, Scalar

Valid = Bool[Tensor, "batch 1 height width"]


class Adversary(NamedTuple):
    """A discriminator that counts."""

    discriminator: nn.Module
    weight: float
    """Of the adversarial loss, before the adaptive weight."""
    last_layer: Tensor
    """Weight of the decoder's last convolution, where the adaptive weight is taken."""
    max_adaptive: float


class GeneratorLoss(NamedTuple):
    """The terms of the autoencoder's loss, each a scalar; `total` is what is minimised."""

    total: Scalar
    pixel: Scalar
    """L1 or L2, mean over all values that count."""
    perceptual: Scalar
    """Perceptual distance, mean over the batch."""
    frequency: Scalar
    """Distance of amplitude spectra, mean over all values."""
    regularization: Scalar
    """KL divergence of one picture's posterior, nats; or the codebook's loss."""
    adversarial: Scalar
    adaptive: Scalar
    """The adaptive weight of the adversarial term; 0 while the discriminator does not count."""


class ReconstructionLoss(nn.Module):
    """The loss of the first stage, with its one trainable number.

    (r / e^s + s) + w_reg * regularization + w_d * lambda * g, r = |x - y| + w_p d(x, y) + w_f f(x, y),
    d and f being broadcast over the values of their picture. As in the published code, r is summed
    over a picture's values with the KL bottleneck, and averaged with a codebook.

    Args:
        config: the weights.
        perceptual: distance network, or None for pixels alone.
    """

    def __init__(
        self, config: AutoencoderLossConfig, perceptual: PerceptualDistance | None
    ) -> None:
        super().__init__()
        self.config = config
        self.perceptual = [perceptual]  # in a list: frozen, so neither trained nor saved
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=config.learn_variance)

    @property
    def has_perceptual(self) -> bool:
        """Whether a perceptual distance is part of it."""
        return self.perceptual[0] is not None

    def forward(
        self,
        images: Images,
        reconstructions: Images,
        posterior: Posterior,
        *,
        valid: Valid | None = None,
        adversary: Adversary | None = None,
    ) -> GeneratorLoss:
        """The loss of a batch.

        Args:
            images: what was shown, `[b, c, h, w]` in [-1, 1].
            reconstructions: what came back.
            posterior: of the images.
            valid: pixels that count, all if None; the reconstructions must come from `where_valid`.
            adversary: or None while it does not count; then nothing of it is computed.
        """
        config, perceptual = self.config, self.perceptual[0]
        shown = reconstructions.float()
        zero = torch.zeros((), device=images.device)
        pixel = pixel_distance(images, shown, config.reconstruction)
        if valid is not None:
            pixel = pixel / valid.float().mean().clamp_min(1e-6)
        distance = perceptual(images, shown).mean() if perceptual else zero
        frequency = frequency_distance(images, shown) if config.frequency_weight else zero
        per_value = (
            pixel + config.perceptual_weight * distance + config.frequency_weight * frequency
        )
        quantized = isinstance(posterior, QuantizedPosterior)
        values = 1 if quantized else images[0].numel()
        reconstruction = values * (per_value / self.log_variance.exp() + self.log_variance)
        regularization = posterior.penalty()
        weight = config.codebook_weight if quantized else config.kl_weight
        total = reconstruction + weight * regularization
        terms = GeneratorLoss(total, pixel, distance, frequency, regularization, zero, zero)
        if adversary is None:
            return terms
        adversarial = adversarial_loss(adversary.discriminator(shown))
        adaptive = adaptive_weight(
            reconstruction, adversarial, adversary.last_layer, adversary.max_adaptive
        )
        total = total + adversary.weight * adaptive * adversarial
        return terms._replace(total=total, adversarial=adversarial, adaptive=adaptive)


def where_valid(images: Images, reconstructions: Images, valid: Valid | None) -> Images:
    """Reconstructions with the images' own values where a pixel does not count.

    So no term of any loss sees a difference there, and no gradient comes from there.
    """
    return reconstructions if valid is None else torch.where(valid, reconstructions, images)


def pixel_distance(images: Images, reconstructions: Images, kind: str) -> Scalar:
    """Mean absolute (`l1`) or squared (`l2`) difference of values."""
    difference = images - reconstructions
    return (difference.abs() if kind == "l1" else difference.square()).mean()


def frequency_distance(images: Images, reconstructions: Images) -> Scalar:
    """Mean squared difference of amplitude spectra, orthonormal FFT (Dhariwal et al. 2020, Sec. 3.3).

    Phases do not matter, so that detail of the right kind counts though it is out of place.
    """
    amplitudes = [torch.fft.rfft2(x, norm="ortho").abs() for x in (images, reconstructions)]
    return (amplitudes[0] - amplitudes[1]).square().mean()
