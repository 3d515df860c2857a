"""The second stage as one module: whitening, conditioner, U-Net (Rombach et al. 2022, Sec. 3.2)."""

import torch
from torch import nn

from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.label import LabelConditioner
from ldmkit.diffusion.denoiser import denoiser
from ldmkit.diffusion.parameterization import PARAMETERIZATIONS
from ldmkit.diffusion.schedule import build_schedule
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.facts import Whitening
from ldmkit.networks.unet import UNet
from ldmkit.tensors import Labels, Latents, Sigmas


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
        width = config.unet.context_channels
        self.label = LabelConditioner(config.classes, width) if config.classes else None
        self.unet = UNet(
            config.unet, in_channels=z, out_channels=z, use_tokens=self.label is not None
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

    def condition(self, labels: Labels) -> Condition:
        """The condition of a batch of labels (-1: none)."""
        return self.label(labels) if self.label is not None else Condition()

    def null(self, count: int) -> Condition:
        """The condition of samples that are told nothing."""
        return self.label.null(count) if self.label is not None else Condition()

    def denoise(self, x: Latents, sigma: Sigmas, condition: Condition) -> Latents:
        """Clean whitened latents expected behind `x`, noisy at level `sigma`."""
        return denoiser(self._predict, self.schedule, self.parameterization)(x, sigma, condition)

    def _predict(self, x: Latents, timesteps: Sigmas, condition: Condition) -> Latents:
        vector, tokens, channels, previous = condition
        if previous is not None:
            previous = previous.repeat(len(x) // len(previous), 1, 1, 1)
        return self.unet(x, timesteps, vector, tokens, channels, previous)
