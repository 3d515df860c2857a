"""How much each noise level counts in the loss.

A weighting is a factor on the squared error of the clean latents, a function of sigma alone, so that it
means the same under every parameterization; SNR = 1 / sigma^2. The squared error of what the network
predicts is that of the clean latents / c_out^2. Hence the paper's factor on the error of epsilon is
sigma^2 times the one below, on that of v sigma^2 / (1 + sigma^2) times.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.diffusion.parameterization import Parameterization
from ldmkit.diffusion_configs import ObjectiveConfig
from ldmkit.tensors import Sigmas


def weight(sigma: Sigmas, parameterization: Parameterization, config: ObjectiveConfig) -> Sigmas:
    """The factor on the squared error of the clean latents, for the weighting of the config."""
    own = parameterization(sigma).c_out.square().reciprocal()
    return own * relative_weight(sigma, parameterization, config)


def relative_weight(
    sigma: Sigmas, parameterization: Parameterization, config: ObjectiveConfig
) -> Sigmas:
    """The factor on the loss of the parameterization's own paper; 1 for `simple`."""
    weighting = WEIGHTINGS[config.weighting]
    if weighting is None:
        return torch.ones_like(sigma)
    return weighting(sigma, config) * parameterization(sigma).c_out.square()


def min_snr(sigma: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """min(SNR, gamma) (Hang et al. 2023)."""
    return sigma.square().reciprocal().clamp(max=config.min_snr_gamma)


def soft_min_snr(sigma: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """1 / (sigma^2 + 1 / gamma), the same without the kink (Crowson et al. 2024)."""
    return (sigma.square() + 1.0 / config.min_snr_gamma).reciprocal()


def p2(sigma: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """SNR / (k + SNR)^gamma: less for the noise too faint to hide content (Choi et al. 2022)."""
    snr = sigma.square().reciprocal()
    return snr / (config.p2_k + snr).pow(config.p2_gamma)


def debiased(sigma: Sigmas, config: ObjectiveConfig) -> Sigmas:
    """sqrt(SNR), which is 1 / sqrt(SNR) on the error of epsilon (Yu et al. 2023)."""
    return sigma.reciprocal()


class Uncertainty(nn.Module):
    """The learned weighting of EDM2 (Karras et al. 2024, Eq. 21): L becomes L / exp(u) + u.

    u is linear in random Fourier features of ln(sigma) / 4 and starts at 0; where it is best,
    exp(u) = E[L] of that noise level, so that all levels pull alike. Training adds its parameters to the
    optimizer and it to what is saved; no model file needs it.

    Args:
        generator: draws the features' frequencies and phases.
        features: how many.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, generator: torch.Generator, features: int = 128) -> None:
        super().__init__()
        turn = 2.0 * math.pi
        self.register_buffer("frequencies", turn * torch.randn(features, generator=generator))
        self.register_buffer("phases", turn * torch.rand(features, generator=generator))
        self.out = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, sigma: Sigmas) -> Float[Tensor, " batch"]:
        """u, the logarithm of the loss expected at each level."""
        told = sigma.float().log()[:, None] / 4.0
        features = (told * self.frequencies + self.phases).cos() * math.sqrt(2.0)
        return self.out(features)[:, 0]

    def balanced(self, sigma: Sigmas, losses: Sigmas) -> Sigmas:
        """What is minimised in place of the losses of `denoising_loss`, for each sample."""
        u = self(sigma)
        return losses * (-u).exp() + u


WEIGHTINGS: dict[str, Callable[[Sigmas, ObjectiveConfig], Sigmas] | None] = {
    "simple": None,
    "min-snr": min_snr,
    "soft-min-snr": soft_min_snr,
    "p2": p2,
    "debiased": debiased,
    "uncertainty": None,  # balances the simple loss; see `Uncertainty`
}
"""None leaves the loss of the parameterization's own paper. Keep in step with
`diffusion_configs.WeightingName`; a test compares them."""
