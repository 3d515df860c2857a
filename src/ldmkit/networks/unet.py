"""The time-conditional U-Net (Dhariwal and Nichol 2021; Rombach et al. 2022, App. E).

Going down, each level has residual blocks, with attention where the config asks for it, and halves
the map; the way up mirrors it and takes the stored maps in as further channels. With tokens,
attention is a spatial transformer (self-attention, cross-attention, feed-forward); without, plain
self-attention.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
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

EPS = 1e-5
TRANSFORMER_EPS = 1e-6
FEED_FORWARD_FACTOR = 4


class Attention(nn.Module):
    """Multi-head attention from tokens to a context (Vaswani et al. 2017).

    Args:
        width: of the tokens, in and out.
        context_width: of what is attended to.
        heads: must divide `width`.
    """

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, tokens: Tokens, context: Tokens) -> Tokens:
        """Each token becomes a mixture of the context's values; the shape stays."""
        q, k, v = (
            rearrange(projected, "b count (heads width) -> b heads count width", heads=self.heads)
            for projected in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(attended, "b heads count width -> b count (heads width)"))


class GatedFeedForward(nn.Module):
    """Linear, GELU gate, linear (Shazeer 2020, "GEGLU"), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * FEED_FORWARD_FACTOR * width)
        self.contract = nn.Linear(FEED_FORWARD_FACTOR * width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """Each token on its own; the shape stays."""
        value, gate = self.expand(tokens).chunk(2, dim=-1)
        return self.contract(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and with a residual."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, width, heads)
        self.cross_attention = Attention(width, context_width, heads)
        self.feed_forward = GatedFeedForward(width)

    def forward(self, tokens: Tokens, context: Tokens) -> Tokens:
        """Let tokens see each other and the context; the shape stays."""
        normed = self.norm1(tokens)
        tokens = tokens + self.self_attention(normed, normed)
        tokens = tokens + self.cross_attention(self.norm2(tokens), context)
        return tokens + self.feed_forward(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map (Rombach et al. 2022, App. E.2.1)."""

    def __init__(
        self, channels: int, *, heads: int, depth: int, context_width: int, norm: Norm
    ) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads) for _ in range(depth)
        )
        self.project_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: FeatureMap, context: Tokens) -> FeatureMap:
        """Map `[b, c, h, w]` to the same shape, having looked at `[b, count, width]`."""
        tokens = rearrange(self.project_in(self.norm(x)), "b c y x -> b (y x) c")
        for block in self.blocks:
            tokens = block(tokens, context)
        return x + self.project_out(rearrange(tokens, "b (y x) c -> b c y x", y=x.shape[2]))


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
        return maps if self.downsample is None else [*maps, self.downsample(x)]


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
        return x if self.upsample is None else self.upsample(x)


class UNet(nn.Module):
    """Predicts from noisy latents, their time step and a condition.

    Args:
        config: widths and depths.
        in_channels: of the latents and what is concatenated to them.
        out_channels: of the prediction.
        use_tokens: attend to tokens of width `config.context_channels`.
    """

    def __init__(
        self, config: UNetConfig, *, in_channels: int, out_channels: int, use_tokens: bool
    ) -> None:
        super().__init__()
        self.config, self.use_tokens = config, use_tokens
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.embedding_width = 4 * config.channels
        self.embed_time = nn.Sequential(
            nn.Linear(config.channels, self.embedding_width),
            nn.SiLU(),
            nn.Linear(self.embedding_width, self.embedding_width),
        )
        self.conv_in = nn.Conv2d(in_channels, config.channels, 3, padding=1)

        channels, stored = config.channels, [config.channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            stages = []
            for _ in range(config.residual_blocks):
                stages.append(self._stage(channels, width, level))
                channels = width
                stored.append(channels)
            last = level == len(widths) - 1
            downsample = None if last else nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(DownLevel(stages, downsample))
            if not last:
                stored.append(channels)

        self.middle_in = Stage(self._residual(channels, channels), self._attention(channels))
        self.middle_out = self._residual(channels, channels)

        self.up = nn.ModuleList()  # coarsest first, in the order they are run
        for level, width in reversed(list(enumerate(widths))):
            stages = []
            for _ in range(config.residual_blocks + 1):
                stages.append(self._stage(channels + stored.pop(), width, level))
                channels = width
            self.up.append(UpLevel(stages, Upsample(width) if level else None))

        self.norm_out = Norm(config.norm_groups, EPS)(channels)
        self.conv_out = zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(
        self,
        x: FeatureMap,
        timesteps: Float[Tensor, " batch"],
        vector: Embedding | None = None,
        tokens: Tokens | None = None,
        channels: FeatureMap | None = None,
    ) -> FeatureMap:
        """Predict `[b, out_channels, h, w]`.

        Args:
            x: scaled noisy latents.
            timesteps: t of each sample, 0 to T - 1.
            vector: added to the time embedding.
            tokens: attended to; needed if and only if the network was built for tokens.
            channels: concatenated to `x`.
        """
        embedding = self.embed_time(timestep_embedding(timesteps, self.config.channels))
        if vector is not None:
            embedding = embedding + vector
        if channels is not None:
            x = torch.cat([x, channels], dim=1)

        skips = [self.conv_in(x)]
        for level in self.down:
            skips += level(skips[-1], embedding, tokens)
        x = self.middle_out(self.middle_in(skips[-1], embedding, tokens), embedding)
        for level in self.up:
            x = level(x, skips, embedding, tokens)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _stage(self, channels: int, width: int, level: int) -> Stage:
        attends = 2**level in self.config.attention_factors
        return Stage(self._residual(channels, width), self._attention(width) if attends else None)

    def _residual(self, channels: int, width: int) -> ResidualBlock:
        return ResidualBlock(
            channels,
            width,
            embedding=self.embedding_width,
            dropout=self.config.dropout,
            norm=Norm(self.config.norm_groups, EPS),
        )

    def _attention(self, channels: int) -> nn.Module:
        config = self.config
        heads = channels // (config.head_channels or channels)
        if not self.use_tokens:
            norm = Norm(config.norm_groups, EPS)
            return SpatialAttention(channels, heads=heads, norm=norm, zero_init=True)
        return SpatialTransformer(
            channels,
            heads=heads,
            depth=config.transformer_depth,
            context_width=config.context_channels,
            norm=Norm(config.norm_groups, TRANSFORMER_EPS),
        )
