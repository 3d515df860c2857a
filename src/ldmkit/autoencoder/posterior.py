"""What `encode` returns: a distribution over latents (Kingma and Welling 2014; Rombach et al. 2022).

Every posterior has `mean` and `std` `[b, z, y, x]` (std is None where the bottleneck has no noise),
`sample(noise)`, which draws latents, and `penalty()`, which is what regularises them.
"""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Latents, Noise, Scalar


class GaussianPosterior:
    """The KL bottleneck's: a diagonal Gaussian.

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
        """KL divergence to the unit Gaussian, nats: summed over a sample, averaged over the batch.

        1/2 sum(mean^2 + std^2 - 1 - log std^2) (Kingma and Welling 2014, App. B).
        """
        log_variance = self.log_variance
        terms = self.mean.square() + log_variance.exp() - 1.0 - log_variance
        return 0.5 * terms.sum() / len(terms)


class PointPosterior:
    """The posterior of a bottleneck without noise: all its mass on one point.

    Args:
        mean: the latents.
    """

    std = None

    def __init__(self, mean: Latents) -> None:
        self.mean = mean.float()

    def sample(self, noise: Noise) -> Latents:
        """The latents themselves; no noise is drawn."""
        del noise
        return self.mean

    def penalty(self) -> Scalar:
        """Zero: nothing holds these latents back."""
        return torch.zeros((), device=self.mean.device)


Posterior: TypeAlias = GaussianPosterior | PointPosterior
