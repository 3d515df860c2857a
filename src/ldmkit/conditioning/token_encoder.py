"""A transformer over token ids: the paper's domain encoder tau (Rombach et al. 2022, Sec. 3.3, App. E.2.1)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

EMBEDDING_STD = 0.02
FEED_FORWARD_FACTOR = 4

Ids = Int[Tensor, "batch count"]
Tokens = Float[Tensor, "batch count width"]


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, in both directions (Vaswani et al. 2017).

    Args:
        width: of the tokens.
        heads: how many.
        head_width: of each; `heads * head_width` need not be `width`.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(width, heads * head_width, bias=False) for _ in range(3)
        )
        self.to_out = nn.Linear(heads * head_width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """Each token becomes a mixture of all; the shape stays."""
        q, k, v = (
            rearrange(to(tokens), "b count (heads width) -> b heads count width", heads=self.heads)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(attended, "b heads count width -> b count (heads width)"))


class EncoderBlock(nn.Module):
    """Self-attention, then GELU feed-forward, each behind a LayerNorm and with a residual."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, head_width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, FEED_FORWARD_FACTOR * width),
            nn.GELU(),
            nn.Linear(FEED_FORWARD_FACTOR * width, width),
        )

    def forward(self, tokens: Tokens) -> Tokens:
        """The shape stays."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.feed_forward(self.norm2(tokens))


class TokenEncoder(nn.Module):
    """Ids to tokens: learnt embeddings of token and position, blocks, a last LayerNorm.

    No mask: padding is a token like others and is attended to, as in the paper's code.

    Args:
        vocabulary: how many ids there are.
        length: ids in a row.
        width: of the tokens.
        depth: how many blocks.
        heads: attention heads of each block.
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
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, head_width) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, ids: Ids) -> Tokens:
        """Ids `[b, length]` to tokens `[b, length, width]`."""
        tokens = self.token_embedding(ids) + self.position_embedding.weight
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm_out(tokens)
