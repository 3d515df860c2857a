"""The second stage as one module: whitening, conditioners, U-Net (Rombach et al. 2022, Sec. 3.2)."""

from typing import cast

import torch
from torch import nn

from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Conditioner, Values, Widths
from ldmkit.conditioning.kinds import KINDS, joined
from ldmkit.diffusion.denoiser import denoiser
from ldmkit.diffusion.parameterization import PARAMETERIZATIONS
from ldmkit.diffusion.schedule import build_schedule
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.facts import Whitening
from ldmkit.networks.unet import UNet
from ldmkit.tensors import Latents, Sigmas


class LatentDiffusion(nn.Module):
    """Denoises whitened latents under a condition; everything trained in stage 2 is in here.

    The whitening of raw latents lives in two buffers of this module and nowhere else, so that a
    scale can be neither forgotten nor applied twice.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.register_buffer("latent_mean", torch.zeros(z))
        self.register_buffer("latent_std", torch.ones(z))
        conditions = config.conditions
        widths = Widths(config.unet.context_channels, config.unet.embedding_width)
        self.conditioners = nn.ModuleDict(
            {
                condition.kind: KINDS[condition.kind].build(condition, widths)
                for condition in conditions
            }
        )
        self.unet = UNet(
            config.unet,
            in_channels=z + sum(condition.channels for condition in conditions),
            out_channels=z,
            use_tokens=any(condition.attended for condition in conditions),
        )
        with torch.device("cpu"):  # a table of numbers, also where the model is without memory
            self.schedule = build_schedule(config.schedule, config.parameterization)
        self.parameterization = PARAMETERIZATIONS[config.parameterization]

    def set_whitening(self, whitening: Whitening) -> None:
        """Take the statistics of the latent set."""
        self.latent_mean.copy_(torch.tensor(whitening.mean))
        self.latent_std.copy_(torch.tensor(whitening.std))

    def whiten(self, raw: Latents) -> Latents:
        """Raw latents to mean 0 and variance 1 per channel."""
        return (raw - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def unwhiten(self, latents: Latents) -> Latents:
        """Back to the autoencoder's own space."""
        return latents * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)

    def received(self, values: Values) -> dict[str, torch.Tensor]:
        """What a batch is told, where the network is and in its units."""
        found = {kind: value.to(self.latent_mean.device) for kind, value in values.items()}
        if "mask" in found:  # raw latents of the picture around the hole, and the hole
            latents, hole = found["mask"][:, :-1], found["mask"][:, -1:]
            found["mask"] = torch.cat([self.whiten(latents), hole], dim=1)
        return found

    def empty(self, values: Values) -> dict[str, torch.Tensor]:
        """Values of the same shapes that say nothing."""
        return {kind: self._conditioner(kind).empty(value) for kind, value in values.items()}

    def condition(self, values: Values) -> Condition:
        """The condition of a batch from what it is told: received values of every condition.

        Raises:
            KeyError: a condition of the model has no values.
        """
        return joined([self.condition_of(kind, values[kind]) for kind in self.conditioners])

    def condition_of(self, kind: str, values: torch.Tensor) -> Condition:
        """What one of the conditions alone says to the network, in its precision, from received values."""
        return _as(self.unet.dtype, self._conditioner(kind)(values))

    def _conditioner(self, kind: str) -> Conditioner:
        return cast("Conditioner", self.conditioners[kind])

    def denoise(self, x: Latents, sigma: Sigmas, condition: Condition) -> Latents:
        """Clean whitened latents expected behind `x`, noisy at level `sigma`."""
        return denoiser(self._predict, self.schedule, self.parameterization)(x, sigma, condition)

    def _predict(self, x: Latents, timesteps: Sigmas, condition: Condition) -> Latents:
        previous = condition.previous
        if previous is not None:
            previous = previous.repeat(len(x) // len(previous), 1, 1, 1)
        dtype = self.unet.dtype
        vector, tokens, channels, previous = _as(dtype, condition._replace(previous=previous))
        predicted = self.unet(x.to(dtype), timesteps, vector, tokens, channels, previous)
        return predicted.to(x.dtype)


def _as(dtype: torch.dtype, condition: Condition) -> Condition:
    """The same condition in another precision; itself where it is that already."""
    return Condition(*(None if part is None else part.to(dtype) for part in condition))
