"""What `encode` returns: a diagonal Gaussian over latents (Kingma and Welling 2014; Rombach et al. 2022)."""

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Latents, Noise, Scalar


class GaussianPosterior:
    """q(z | image), one mean and standard deviation per latent value.

    Args:
        moments: `[b, 2z, y, x]`, means and log-variances; the latter are clamped to [-30, 20].
    """

    def __init__(self, moments: Float[Tensor, "b two_z y x"]) -> None:
        mean, log_variance = moments.float().chunk(2, dim=1)  # sums of many terms: never in bf16
        self.mean: Latents = mean
        self.log_variance: Latents = log_variance.clamp(-30.0, 20.0)

    @property
    def std(self) -> Latents:
        """Standard deviations, `[b, z, y, x]`."""
        return torch.exp(0.5 * self.log_variance)

    def sample(self, noise: Noise) -> Latents:
        """Draw latents: mean + std * noise (differentiable in the moments)."""
        return self.mean + self.std * noise(self.mean)

    def penalty(self) -> Scalar:
        """KL divergence to the unit Gaussian: summed over a sample, averaged over the batch.

        1/2 sum(mean^2 + std^2 - 1 - log std^2) (Kingma and Welling 2014, App. B).
        """
        log_variance = self.log_variance
        terms = self.mean.square() + log_variance.exp() - 1.0 - log_variance
        return 0.5 * terms.sum() / len(terms)
