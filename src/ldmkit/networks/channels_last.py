"""Maps whose channels come last in memory, on the CPU.

In bfloat16 its convolutions compute so, and copy every map to and from it otherwise. What keeps networks from training
so is torch's group norm, whose gradient takes ten times as long there; so it has one of its own here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

CHANNELS_LAST = torch.channels_last
FAST_PIXELS = 1024
"""Of a map; from so many on torch's group norm is as fast with channels last as otherwise, below four times as slow."""

Map = Float[Tensor, "batch _channels _y _x"]
Rows = Float[Tensor, "batch pixels channels"]
Slopes = tuple[Map, Tensor, Tensor, None, None]


def laid_out(x: Map) -> Map:
    """A map in the memory layout in which the layers that follow are trained fastest; the same numbers.

    With channels last where it is large, computed in bfloat16 on the CPU, and gradients are taken; of small
    maps they come first. Others stay as they are.
    """
    low = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (low and x.device.type == "cpu" and torch.is_grad_enabled()):
        return x
    large = x.shape[2] * x.shape[3] >= FAST_PIXELS
    return x.contiguous(memory_format=CHANNELS_LAST if large else torch.contiguous_format)


def activated(norm: nn.Module, x: Map) -> Map:
    """SiLU of what a norm gives, which has to be a map of its own: its memory is used again where that is possible."""
    if not torch.is_grad_enabled():
        return F.silu(norm(x), inplace=True)
    if isinstance(norm, nn.GroupNorm) and x.dtype == torch.bfloat16 and is_channels_last(x):
        return _GroupNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(norm(x))


def is_channels_last(x: Map) -> bool:
    """Whether a map lies so on the CPU, and not otherwise too."""
    last = x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()
    return last and x.device.type == "cpu"


class _GroupNormSiLU(Function):
    """Both at once, of which the input alone is kept for the gradient. Channels last, bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Map, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Map:  # noqa: ANN401
        batch, channels, height, width = x.shape
        normed, mean, inverse = torch.ops.aten.native_group_norm(
            x, weight, bias, batch, channels, height * width, groups, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Map) -> Slopes:  # noqa: ANN401
        """The gradient of group normalisation as torch's kernel takes it, on rows of pixels.

        With g the gradient of what is normalised, w the weight, m and r mean and 1 / deviation of a group of
        n numbers, S sums over the group: dx = w r g + a x - a m - r S[w g] / n, a = r^3 (m S[w g] - S[w g x]) / n.
        Sums are taken in float32 and rounded to bfloat16, as gradients of weights are there.
        """
        x, weight, bias, *moments = ctx.saved_tensors
        rows, groups = _rows(x), moments[0].shape[1]
        each = x.shape[1] // groups
        mean, inverse = (one.float().repeat_interleave(each, dim=1)[:, None] for one in moments)
        scale = inverse * weight
        normed = torch.addcmul((bias - mean * scale).to(x.dtype), rows, scale.to(x.dtype))
        slope = torch.ops.aten.silu_backward(_rows(gradients[0]), normed)

        sums = slope.sum(dim=1, keepdim=True).float()
        products = torch.mul(slope, rows, out=normed).sum(dim=1, keepdim=True).float()
        count = rows.shape[1] * each
        of_slope, of_products = (
            (weight * one).unflatten(2, (groups, each)).sum(dim=3).repeat_interleave(each, dim=2)
            for one in (sums, products)
        )
        factor = (of_slope * mean - of_products) * inverse.pow(3) / count
        shift = -factor * mean - of_slope * inverse / count
        result = torch.addcmul(shift.to(x.dtype), rows, factor.to(x.dtype))
        result.addcmul_(slope, scale.to(x.dtype))

        of_weight = ((products - sums * mean) * inverse).sum(dim=(0, 1)).to(weight.dtype)
        of_bias = sums.sum(dim=(0, 1)).to(bias.dtype)
        of_input = result.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return of_input, of_weight, of_bias, None, None


def _rows(x: Map) -> Rows:
    """The pixels of a map; no copy where channels come last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
