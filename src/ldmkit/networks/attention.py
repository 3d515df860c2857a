"""Scaled dot-product attention by the kernel that is fastest where it runs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MANY_PAIRS = 256 * 256
"""Pairs of a query and a key; up to so many, their weights are small enough to be kept."""

Queries = Float[Tensor, "batch heads queries width"]
Keys = Float[Tensor, "batch heads keys width"]


def attend(q: Queries, k: Keys, v: Keys) -> Queries:
    """Values mixed by softmax(q k^T / sqrt(width)) (Vaswani et al. 2017).

    On the CPU the backward pass of the fused kernel is slow in bfloat16 for short sequences (2 to 7
    times; docs/performance.md): there training takes plain matrix products.
    """
    short = q.shape[2] * k.shape[2] <= MANY_PAIRS
    if not (short and q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v)
    logits = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    return logits.softmax(dim=3) @ v
