"""Encoder and decoder of the paper's autoencoder (Rombach et al. 2022, App. E; Esser et al. 2021).

Down-sampling is asymmetric (one row and column of zeros at the right and bottom, then a 3x3
convolution of stride 2), up-sampling is nearest-neighbour and a convolution; the decoder has one
residual block more per level than the encoder.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.networks.blocks import FeatureMap, Norm, ResidualBlock, SpatialAttention, Upsample
from ldmkit.networks.channels_last import activated, laid_out
from ldmkit.tensors import Images

EPS = 1e-6


class Downsample(nn.Module):
    """Halve height and width: zeros at right and bottom, 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: FeatureMap) -> FeatureMap:
        """Map `[b, c, h, w]` to `[b, c, h/2, w/2]`."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Sequential):
    """The coarsest stage: residual block, attention (unless switched off), residual block."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        attention = [_attention(channels, config)] if config.middle_attention else []
        super().__init__(
            _block(channels, channels, config), *attention, _block(channels, channels, config)
        )


class Encoder(nn.Module):
    """Images to the feature map that the bottleneck reads its moments from.

    Args:
        config: the autoencoder's.
        image_channels: of the pictures.
        out_channels: what the bottleneck asks for (2 z for the KL one).

    `checkpointing` may be switched on to save memory in training.
    """

    def __init__(
        self, config: AutoencoderConfig, *, image_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        self.checkpointing = False
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(image_channels, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        channels = config.channels
        for level, width in enumerate(widths):
            stages = nn.Sequential()
            for _ in range(config.residual_blocks):
                stages.append(_block(channels, width, config))
                if 2**level in config.attention_factors:
                    stages.append(_attention(width, config))
                channels = width
            if level < len(widths) - 1:
                stages.append(Downsample(width))
            self.levels.append(stages)
        self.middle = Middle(channels, config)
        self.norm_out = _norm(config)(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, images: Images) -> FeatureMap:
        """Map `[b, c, h, w]` to `[b, out_channels, h/f, w/f]`."""
        h = self.conv_in(laid_out(images))
        for level in self.levels:
            h = _run(level, h, self.checkpointing)
        return self.conv_out(activated(self.norm_out, self.middle(h)))


class Decoder(nn.Module):
    """Latents back to images; the mirror of `Encoder`."""

    def __init__(self, config: AutoencoderConfig, *, image_channels: int) -> None:
        super().__init__()
        self.checkpointing = False
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.middle = Middle(channels, config)
        self.levels = nn.ModuleList()  # coarsest first, in the order they are run
        for level, width in reversed(list(enumerate(widths))):
            stages = nn.Sequential()
            for _ in range(config.residual_blocks + 1):
                stages.append(_block(channels, width, config))
                if 2**level in config.attention_factors:
                    stages.append(_attention(width, config))
                channels = width
            if level > 0:
                stages.append(Upsample(width))
            self.levels.append(stages)
        self.norm_out = _norm(config)(channels)
        self.conv_out = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, latents: FeatureMap) -> Images:
        """Map `[b, z, y, x]` to `[b, c, f y, f x]`."""
        h = self.middle(self.conv_in(latents))
        for level in self.levels:
            h = _run(level, h, self.checkpointing)
        return self.conv_out(activated(self.norm_out, h))


def _run(level: nn.Module, h: FeatureMap, checkpointing: bool) -> FeatureMap:
    """A level's output; with checkpointing its activations are computed again when they are needed."""
    h = laid_out(h)
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(level, h, use_reentrant=False)
    return level(h)


def _block(channels: int, out_channels: int, config: AutoencoderConfig) -> ResidualBlock:
    return ResidualBlock(channels, out_channels, dropout=config.dropout, norm=_norm(config))


def _attention(channels: int, config: AutoencoderConfig) -> SpatialAttention:
    return SpatialAttention(channels, norm=_norm(config), zero_init=False)


def _norm(config: AutoencoderConfig) -> Norm:
    return Norm(config.norm_groups, EPS)
