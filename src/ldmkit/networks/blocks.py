"""Blocks that the autoencoder and the U-Net share.

Both networks of the paper are made of residual blocks with group normalisation and SiLU, attention
over the pixels of a feature map, and resampling by two. They differ in the details given as
arguments here (Rombach et al. 2022, App. E; the code published with it).
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.networks.attention import attend
from ldmkit.networks.channels_last import activated

MANY_PIXELS = 256
"""From so many on, attention is given the memory layout that the kernels without a matrix of all
pairs of pixels ask for, without which they are 4 to 20 times as slow; below, nothing is won."""
QK_EPS = 1e-6
SPREAD = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
"""Where along one axis each of a kernel's three numbers ends up, once pixels are repeated."""

# An underscore: the axis may differ between the arguments and the result of one function.
FeatureMap = Float[Tensor, "batch _channels _y _x"]
Embedding = Float[Tensor, "batch _width"]
Tokens = Float[Tensor, "batch _count _width"]


class PixelRMSNorm(nn.RMSNorm):
    """RMS normalisation over the channels of each pixel (Zhang and Sennrich 2019).

    It takes no mean out and looks at no other pixel: what a pixel gets does not depend on the size
    of the map.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: FeatureMap) -> FeatureMap:
        """Each pixel on its own; the shape stays."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Norm(NamedTuple):
    """How a network normalises: number of groups (or the largest below that divides), epsilon.

    As many groups as channels would take each channel's own mean out of it, and with it the colour
    of a picture and the time embedding: narrow networks want fewer groups than the usual 32.
    """

    groups: int
    eps: float
    kind: Literal["group", "rms"] = "group"

    def __call__(self, channels: int) -> nn.GroupNorm | PixelRMSNorm:
        """A normalisation of this kind."""
        if self.kind == "rms":
            return PixelRMSNorm(channels, self.eps)
        return nn.GroupNorm(self.groups_of(channels), channels, eps=self.eps)

    def groups_of(self, channels: int) -> int:
        """How many groups so many channels get."""
        return max(n for n in range(1, self.groups + 1) if channels % n == 0)


def zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with all its parameters at zero: a residual branch that starts silent."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class ResidualConv2d(nn.Conv2d):
    """A convolution at the end of a residual branch, which is given what it adds to."""

    def forward(self, input: FeatureMap, onto: FeatureMap | None = None) -> FeatureMap:
        """The convolution, added to a map of its result's shape where there is one."""
        h = super().forward(input)
        return h if onto is None else onto + h


class ResidualBlock(nn.Module):
    """norm, SiLU, conv; (+ embedding); norm, SiLU, dropout, conv; + input.

    Args:
        channels: input channels.
        out_channels: output channels; the skip gets a 1x1 convolution where they differ.
        embedding: width of the time embedding, or 0 for none (the autoencoder).
        dropout: probability.
        norm: of both convolutions.
        scale_shift: the embedding scales and shifts what the second norm gives, instead of being
            added before it (Dhariwal and Nichol 2021, "adaptive group normalization").
        resample: double (nearest neighbour) or halve (mean of 2x2) the map behind the first
            activation and on the skip (Brock et al. 2019, "BigGAN").
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embedding: int = 0,
        dropout: float = 0.0,
        norm: Norm,
        scale_shift: bool = False,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        embedded = 2 * out_channels if scale_shift else out_channels
        self.embed = nn.Linear(embedding, embedded) if embedding else None
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = ResidualConv2d(out_channels, out_channels, 3, padding=1)
        if embedding:  # the U-Net's blocks start as the identity, the autoencoder's do not
            zeroed(self.conv2)
        same = channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: FeatureMap, embedding: Embedding | None = None) -> FeatureMap:
        """Map `[b, channels, h, w]` to `[b, out_channels, h, w]`, twice or half as large if asked."""
        h = self.conv1(self._resampled(activated(self.norm1, x)))
        if self.embed is None or embedding is None:
            h = activated(self.norm2, h)
        else:
            told = self.embed(F.silu(embedding))[:, :, None, None]
            if self.scale_shift:
                h = F.silu(self._scaled_and_shifted(h, told))
            else:
                h = activated(self.norm2, h + told)
        return self.conv2(self.dropout(h), self.skip(self._resampled(x)))

    def _scaled_and_shifted(self, h: FeatureMap, told: FeatureMap) -> FeatureMap:
        scale, shift = told.chunk(2, dim=1)
        return self.norm2(h) * (1.0 + scale) + shift

    def _resampled(self, x: FeatureMap) -> FeatureMap:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x


def query_key_norms(width: int, wanted: bool) -> tuple[nn.Module, nn.Module]:
    """What queries and keys of a head go through: RMS norms, or nothing.

    With norms, the logits of attention are bounded, which keeps bfloat16 and large learning rates
    from diverging (Henry et al. 2020; Dehghani et al. 2023).
    """
    if not wanted:
        return nn.Identity(), nn.Identity()
    return nn.RMSNorm(width, eps=QK_EPS), nn.RMSNorm(width, eps=QK_EPS)


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection.

    Args:
        channels: of the map, in and out.
        heads: attention heads; must divide `channels`.
        norm: before the projections.
        zero_init: start as the identity (the U-Net's do, the autoencoder's do not).
        qk_norm: normalise queries and keys.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 1,
        norm: Norm,
        zero_init: bool,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        out = nn.Conv2d(channels, channels, 1)
        self.out = zeroed(out) if zero_init else out
        self.norm_q, self.norm_k = query_key_norms(channels // heads, qk_norm)

    def forward(self, x: FeatureMap) -> FeatureMap:
        """Every pixel attends to every pixel; the shape stays."""
        if torch.is_grad_enabled():
            x = x.contiguous()  # a norm without SiLU has no fast gradient with channels last
        pattern = "b (three heads width) y x -> three b heads (y x) width"
        qkv = rearrange(self.qkv(self.norm(x)), pattern, three=3, heads=self.heads)
        if x.shape[2] * x.shape[3] >= MANY_PIXELS:
            qkv = qkv.contiguous()
        q, k, v = qkv
        q, k = self.norm_q(q), self.norm_k(k)
        attended = attend(q, k, v)
        size = {"y": x.shape[2], "x": x.shape[3]}
        return x + self.out(
            rearrange(attended, "b heads (y x) width -> b (heads width) y x", **size)
        )


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution.

    On the CPU both are computed as one where that is faster: on maps that are large for their
    channels (docs/performance.md). Which way does not depend on the batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: FeatureMap) -> FeatureMap:
        """Map `[b, c, h, w]` to `[b, c, 2h, 2w]`."""
        if self.is_folded(x):
            return F.conv_transpose2d(x, self.folded(), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def is_folded(self, x: FeatureMap) -> bool:
        """Whether both are computed as one."""
        plain = self.conv.padding == (1, 1)  # not made circular
        return plain and x.device.type == "cpu" and x.shape[2] * x.shape[3] >= x.shape[1]

    def folded(self) -> Float[Tensor, "channels channels 4 4"]:
        """Both as one transposed convolution, which takes 16 of 36 multiplications.

        A pixel is repeated in a cell of 2x2, so its part of the result is the sum of the turned kernel,
        shifted to each of the four.
        """
        weight = self.conv.weight.transpose(0, 1).flatten(2)
        spread = torch.kron(SPREAD, SPREAD).to(weight)
        return (weight @ spread).unflatten(2, (4, 4))


def timestep_embedding(timesteps: Float[Tensor, " batch"], width: int) -> Embedding:
    """Sinusoids of the time step, cosines first (Vaswani et al. 2017; order as in the LDM code).

    Args:
        timesteps: time in steps of the discrete schedule; need not be whole numbers.
        width: even number of features.
    """
    exponents = torch.arange(width // 2, device=timesteps.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10_000.0) * exponents / (width // 2))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
