"""The spatial transformer: how the U-Net looks at tokens (Rombach et al. 2022, App. E.2.1)."""

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ldmkit.networks.attention import attend
from ldmkit.networks.blocks import FeatureMap, Norm, Tokens, query_key_norms, zeroed

FEED_FORWARD_FACTOR = 4


class Attention(nn.Module):
    """Multi-head attention from tokens to a context (Vaswani et al. 2017).

    Args:
        width: of the tokens, in and out.
        context_width: of what is attended to.
        heads: must divide `width`.
        qk_norm: normalise queries and keys.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, *, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.norm_q, self.norm_k = query_key_norms(width // heads, qk_norm)

    def forward(self, tokens: Tokens, context: Tokens) -> Tokens:
        """Each token becomes a mixture of the context's values; the shape stays."""
        q, k, v = (
            rearrange(projected, "b count (heads width) -> b heads count width", heads=self.heads)
            for projected in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        attended = attend(self.norm_q(q), self.norm_k(k), v)
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

    def __init__(
        self, width: int, context_width: int, heads: int, *, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, width, heads, qk_norm=qk_norm)
        self.cross_attention = Attention(width, context_width, heads, qk_norm=qk_norm)
        self.feed_forward = GatedFeedForward(width)

    def forward(self, tokens: Tokens, context: Tokens) -> Tokens:
        """Let tokens see each other and the context; the shape stays."""
        normed = self.norm1(tokens)
        tokens = tokens + self.self_attention(normed, normed)
        tokens = tokens + self.cross_attention(self.norm2(tokens), context)
        return tokens + self.feed_forward(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map (Rombach et al. 2022, App. E.2.1).

    Args:
        channels: of the map, in and out.
        heads: attention heads; must divide `channels`.
        depth: how many blocks.
        context_width: of the tokens that are attended to.
        norm: before the blocks.
        qk_norm: normalise queries and keys.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        context_width: int,
        norm: Norm,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads, qk_norm=qk_norm) for _ in range(depth)
        )
        self.project_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: FeatureMap, context: Tokens) -> FeatureMap:
        """Map `[b, c, h, w]` to the same shape, having looked at `[b, count, width]`."""
        tokens = rearrange(self.project_in(self.norm(x)), "b c y x -> b (y x) c")
        for block in self.blocks:
            tokens = block(tokens, context)
        return x + self.project_out(rearrange(tokens, "b (y x) c -> b c y x", y=x.shape[2]))
