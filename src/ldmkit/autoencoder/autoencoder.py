"""The autoencoder: images in [-1, 1] to latents in its own (raw) space, and back."""

import torch
from torch import Tensor, nn

from ldmkit.autoencoder.codebook import Codebook, QuantizedPosterior
from ldmkit.autoencoder.networks import Decoder, Encoder
from ldmkit.autoencoder.posterior import GaussianPosterior, PointPosterior, Posterior
from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.tensors import Images, Latents


class Autoencoder(nn.Module):
    """The paper's autoencoder with any of its bottlenecks (Rombach et al. 2022, Sec. 3.1).

    Its latents are raw: no scale is applied here. Diffusion whitens them, and only there. The
    `identity` has no network: its latents are the images.

    Args:
        config: bottleneck, widths and depths.
        image_channels: of the pictures.
    """

    def __init__(self, config: AutoencoderConfig, image_channels: int) -> None:
        super().__init__()
        self.config, self.image_channels = config, image_channels
        identity = config.bottleneck == "identity"
        self.latent_channels = z = image_channels if identity else config.latent_channels
        self.codebook: Codebook | None = None
        if identity:
            self.encoder = self.to_moments = self.from_latents = self.decoder = nn.Identity()
            return
        moments = 2 * z if self.is_noisy else z
        self.encoder = Encoder(config, image_channels=image_channels, out_channels=moments)
        self.to_moments = nn.Conv2d(moments, moments, 1)  # "quant_conv" in published checkpoints
        if config.bottleneck == "vq":
            self.codebook = Codebook(config.codebook, z)
        self.from_latents = nn.Conv2d(z, z, 1)  # "post_quant_conv"
        self.decoder = Decoder(config, image_channels=image_channels)

    @property
    def device(self) -> torch.device:
        """Where its weights are; the identity has none and works anywhere."""
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights; the identity works in float32."""
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    @property
    def is_noisy(self) -> bool:
        """Whether its posteriors have a standard deviation."""
        return self.config.bottleneck == "kl"

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where the losses are balanced."""
        return self.decoder.get_parameter("conv_out.weight")

    def checkpoint_activations(self, wanted: bool) -> None:
        """Keep the activations of whole levels only, and compute the others again (less memory)."""
        for network in (self.encoder, self.decoder):
            if isinstance(network, Encoder | Decoder):
                network.checkpointing = wanted

    def encode(self, images: Images) -> Posterior:
        """The posterior over latents `[b, z, h/f, w/f]`; h and w must be multiples of f."""
        features = self.to_moments(self.encoder(images.to(self.dtype)))
        if self.codebook is not None:
            return QuantizedPosterior(features, self.codebook)
        return (GaussianPosterior if self.is_noisy else PointPosterior)(features)

    def decode(self, latents: Latents) -> Images:
        """Images for raw latents; not clipped to [-1, 1]. A codebook quantises them first."""
        if self.codebook is not None:
            # one by one: a tie may fall otherwise where a product has another number of rows
            rows = [latents] if torch.is_grad_enabled() else latents.split(1)
            latents = torch.cat([self.codebook.quantize(row) for row in rows])
        return self.decoder(self.from_latents(latents.to(self.dtype))).to(latents.dtype)
