"""The time-conditional U-Net (Dhariwal and Nichol 2021; Rombach et al. 2022, App. E).

Going down, each level has residual blocks, with attention where the config asks for it, and halves
the map; the way up mirrors it and takes the stored maps in as further channels. With tokens,
attention is a spatial transformer (self-attention, cross-attention, feed-forward); without, plain
self-attention. Every residual branch and the output start at zero.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.diffusion_configs import UNetConfig
from ldmkit.networks.blocks import (
    Embedding,
    FeatureMap,
    Norm,
    ResidualBlock,
    SpatialAttention,
    Tokens,
    Upsample,
    timestep_embedding,
    zeroed,
)
from ldmkit.networks.channels_last import activated
from ldmkit.networks.transformer import SpatialTransformer

EPS = 1e-5
TRANSFORMER_EPS = 1e-6


class Stage(nn.Module):
    """A residual block and, at some levels, attention behind it."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: FeatureMap, embedding: Embedding, tokens: Tokens | None) -> FeatureMap:
        """Run both; `tokens` go to a spatial transformer only."""
        x = self.residual(x, embedding)
        if isinstance(self.attention, SpatialTransformer):
            return self.attention(x, tokens)
        return x if self.attention is None else self.attention(x)


class DownLevel(nn.Module):
    """The stages of one resolution on the way down, then halving (but for the last level)."""

    def __init__(self, stages: list[Stage], downsample: nn.Module | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.downsample = downsample

    def forward(
        self, x: FeatureMap, embedding: Embedding, tokens: Tokens | None
    ) -> list[FeatureMap]:
        """Every map made here, in order; the last one goes on, all are used on the way up."""
        maps = []
        for stage in self.stages:
            x = stage(x, embedding, tokens)
            maps.append(x)
        return maps if self.downsample is None else [*maps, _through(self.downsample, x, embedding)]


class UpLevel(nn.Module):
    """The stages of one resolution on the way up, then doubling (but for the last level)."""

    def __init__(self, stages: list[Stage], upsample: nn.Module | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.upsample = upsample

    def forward(
        self, x: FeatureMap, skips: list[FeatureMap], embedding: Embedding, tokens: Tokens | None
    ) -> FeatureMap:
        """Each stage takes the newest of the maps from the way down off the list."""
        for stage in self.stages:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding, tokens)
        return x if self.upsample is None else _through(self.upsample, x, embedding)


class UNet(nn.Module):
    """Predicts from noisy latents, their time step and a condition.

    Args:
        config: widths and depths.
        in_channels: of the latents and what is concatenated to them; with self-conditioning the
            first convolution takes `out_channels` more.
        out_channels: of the prediction.
        use_tokens: attend to tokens of width `config.context_channels`.
    """

    def __init__(
        self, config: UNetConfig, *, in_channels: int, out_channels: int, use_tokens: bool
    ) -> None:
        super().__init__()
        self.config, self.use_tokens, self.out_channels = config, use_tokens, out_channels
        widths, last = config.widths, len(config.widths) - 1
        attends = [factor in config.attention_factors for factor in config.factors]
        self.embedding_width = config.embedding_width
        self.embed_time = nn.Sequential(
            nn.Linear(config.channels, self.embedding_width),
            nn.SiLU(),
            nn.Linear(self.embedding_width, self.embedding_width),
        )
        estimate = out_channels if config.self_conditioning else 0
        self.conv_in = nn.Conv2d(in_channels + estimate, config.channels, 3, padding=1)

        channels, stored = config.channels, [config.channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            stages = []
            for _ in range(config.residual_blocks):
                stages.append(self._stage(channels, width, level, attends=attends[level]))
                channels = width
                stored.append(channels)
            self.down.append(DownLevel(stages, self._downsample(width) if level < last else None))
            if level < last:
                stored.append(channels)

        self.middle_in = self._stage(channels, channels, last, attends=config.middle_attention)
        self.middle_out = self._residual(channels, channels)

        self.up = nn.ModuleList()  # coarsest first, in the order they are run
        for level, width in reversed(list(enumerate(widths))):
            stages = []
            for _ in range(config.residual_blocks + 1):
                seen = channels + stored.pop()
                stages.append(self._stage(seen, width, level, attends=attends[level]))
                channels = width
            self.up.append(UpLevel(stages, self._upsample(width) if level else None))

        self.norm_out = self._norm(EPS)(channels)
        self.conv_out = zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(
        self,
        x: FeatureMap,
        timesteps: Float[Tensor, " batch"],
        vector: Embedding | None = None,
        tokens: Tokens | None = None,
        channels: FeatureMap | None = None,
        previous: FeatureMap | None = None,
    ) -> FeatureMap:
        """Predict `[b, out_channels, h, w]`.

        Args:
            x: scaled noisy latents.
            timesteps: t of each sample, 0 to T - 1.
            vector: added to the time embedding.
            tokens: attended to; needed if and only if the network was built for tokens.
            channels: concatenated to `x`.
            previous: for self-conditioning, an earlier estimate `[b, out_channels, h, w]` of what is
                predicted (Chen et al. 2023); None for none yet.

        Raises:
            ValueError: tokens for a network without, none for one with, or an earlier estimate for
                a network without self-conditioning.
        """
        if (tokens is not None) != self.use_tokens:
            has = "attends to tokens, and got none" if self.use_tokens else "has no use for tokens"
            raise ValueError(f"this U-Net {has}: build it with use_tokens={not self.use_tokens}")
        sinusoids = timestep_embedding(timesteps, self.config.channels)
        embedding = self.embed_time(sinusoids.to(self.dtype))
        if vector is not None:
            embedding = embedding + vector

        skips = [self.conv_in(self._beside(x, channels, previous))]
        for level in self.down:
            skips += level(skips[-1], embedding, tokens)
        x = self.middle_out(self.middle_in(skips[-1], embedding, tokens), embedding)
        for level in self.up:
            x = level(x, skips, embedding, tokens)
        return self.conv_out(activated(self.norm_out, x))

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, and of all that it is given but for the time."""
        return self.conv_in.weight.dtype

    def _beside(
        self, x: FeatureMap, channels: FeatureMap | None, previous: FeatureMap | None
    ) -> FeatureMap:
        """All that the first convolution sees; the earlier estimate comes last."""
        maps = [x] if channels is None else [x, channels]
        if self.config.self_conditioning:
            size = (len(x), self.out_channels, *x.shape[2:])
            maps.append(x.new_zeros(size) if previous is None else previous)
        elif previous is not None:
            raise ValueError(
                "this U-Net takes no earlier estimate: build it with self_conditioning"
            )
        return torch.cat(maps, dim=1) if len(maps) > 1 else x

    def _stage(self, channels: int, width: int, level: int, *, attends: bool) -> Stage:
        residual = self._residual(channels, width)
        return Stage(residual, self._attention(width, level) if attends else None)

    def _norm(self, eps: float) -> Norm:
        return Norm(self.config.norm_groups, eps, self.config.norm)

    def _residual(
        self, channels: int, width: int, resample: Literal["up", "down"] | None = None
    ) -> ResidualBlock:
        return ResidualBlock(
            channels,
            width,
            embedding=self.embedding_width,
            dropout=self.config.dropout,
            norm=self._norm(EPS),
            scale_shift=self.config.scale_shift,
            resample=resample,
        )

    def _downsample(self, width: int) -> nn.Module:
        if self.config.residual_updown:
            return self._residual(width, width, "down")
        return nn.Conv2d(width, width, 3, stride=2, padding=1)

    def _upsample(self, width: int) -> nn.Module:
        return (
            self._residual(width, width, "up") if self.config.residual_updown else Upsample(width)
        )

    def _attention(self, channels: int, level: int) -> nn.Module:
        config = self.config
        heads = config.heads_of(channels)
        if not self.use_tokens:
            return SpatialAttention(
                channels, heads=heads, norm=self._norm(EPS), zero_init=True, qk_norm=config.qk_norm
            )
        return SpatialTransformer(
            channels,
            heads=heads,
            depth=config.depth_of(level),
            context_width=config.context_channels,
            norm=self._norm(TRANSFORMER_EPS),
            qk_norm=config.qk_norm,
        )


def _through(resample: nn.Module, x: FeatureMap, embedding: Embedding) -> FeatureMap:
    """Halve or double; a residual block is told the time, a plain convolution is not."""
    return resample(x, embedding) if isinstance(resample, ResidualBlock) else resample(x)
