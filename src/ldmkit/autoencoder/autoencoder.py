"""The autoencoder: images in [-1, 1] to latents in its own (raw) space, and back."""

from torch import nn

from ldmkit.autoencoder.networks import Decoder, Encoder
from ldmkit.autoencoder.posterior import GaussianPosterior
from ldmkit.configs import AutoencoderConfig
from ldmkit.tensors import Images, Latents


class Autoencoder(nn.Module):
    """The paper's KL-regularised autoencoder (Rombach et al. 2022, Sec. 3.1).

    Its latents are raw: no scale is applied here. Diffusion whitens them, and only there.

    Args:
        config: widths and depths.
        image_channels: of the pictures.
    """

    def __init__(self, config: AutoencoderConfig, image_channels: int) -> None:
        super().__init__()
        self.config, self.image_channels = config, image_channels
        z = config.latent_channels
        self.encoder = Encoder(config, image_channels=image_channels, out_channels=2 * z)
        self.to_moments = nn.Conv2d(2 * z, 2 * z, 1)  # "quant_conv" in the published checkpoints
        self.from_latents = nn.Conv2d(z, z, 1)  # "post_quant_conv"
        self.decoder = Decoder(config, image_channels=image_channels)

    def encode(self, images: Images) -> GaussianPosterior:
        """The posterior over latents `[b, z, h/f, w/f]`; h and w must be multiples of f."""
        return GaussianPosterior(self.to_moments(self.encoder(images)))

    def decode(self, latents: Latents) -> Images:
        """Images for raw latents; not clipped to [-1, 1]."""
        return self.decoder(self.from_latents(latents))
