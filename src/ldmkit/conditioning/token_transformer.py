"""A transformer over ids: the paper's domain encoder tau (Rombach et al. 2022, Sec. 3.3, App. E.2.1)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldmkit.networks.attention import attend

FEED_FORWARD_FACTOR = 4

Ids = Int[Tensor, "batch length"]
Tokens = Float[Tensor, "batch length width"]


class SelfAttention(nn.Module):
    """Multi-head self-attention without mask (Vaswani et al. 2017).

    Args:
        width: of the tokens, in and out.
        heads: how many.
        head_width: of each; the published models have 8 of 64 whatever their width.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """Each token becomes a mixture of all tokens' values; the shape stays."""
        q, k, v = (
            rearrange(projected, "b count (heads width) -> b heads count width", heads=self.heads)
            for projected in (self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        )
        attended = attend(q, k, v)
        return self.to_out(rearrange(attended, "b heads count width -> b count (heads width)"))


class EncoderBlock(nn.Module):
    """Self-attention, then a GELU layer four times as wide, each behind a LayerNorm and with a residual.

    Both start as nothing, so that at first each token says what it is and not what all have in common.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, head_width)
        self.expand = nn.Linear(width, FEED_FORWARD_FACTOR * width)
        self.contract = nn.Linear(FEED_FORWARD_FACTOR * width, width)
        for branch in (self.attention.to_out, self.contract):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)

    def forward(self, tokens: Tokens) -> Tokens:
        """Let tokens see each other; the shape stays."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.contract(F.gelu(self.expand(self.norm2(tokens))))


class TokenTransformer(nn.Module):
    """A bidirectional transformer over ids, with learnt embeddings of token and position.

    Embeddings start with a standard deviation of 1. With the usual 0.02 the blocks, which see them
    normalised, soon add a hundred times as much to them, and what was told is lost in it.

    Args:
        vocabulary: number of ids.
        length: most ids in a row.
        width: of the tokens that come out.
        depth: blocks; the paper's text models have 32.
        heads: of each attention.
        head_width: of each head.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        *,
        depth: int,
        heads: int = 8,
        head_width: int = 64,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, head_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Ids) -> Tokens:
        """Ids `[batch, length]` to tokens `[batch, length, width]`."""
        tokens = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)
