"""Networks made ready to be run many times without gradients: bfloat16, and weights laid out once.

oneDNN puts the weights of a convolution or linear layer into an order of its own at each call. On
small maps that takes as long as the multiplication. `torch.compile` with freezing lays them out once, by the
operators that are used here; they are private to torch, so each is tried before it is relied on.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ldmkit.networks.transformer import TransformerBlock

SHAPES = 4
"""Of maps for which a layer keeps its packed weights at most; pictures in buckets have many."""
FEW_CHANNELS = 8
"""Below so many, of input or output, a convolution is left alone: nothing is won."""


def compute_in_bfloat16(network: nn.Module) -> None:
    """From here on a network computes in bfloat16, on the CPU with packed weights.

    Gradients can still be taken with respect to its input. The tensors keep their names; what is
    given to the network has to be bfloat16.

    Args:
        network: in evaluation mode, where it is to run; its weights do not change any more.
    """
    network.to(torch.bfloat16)
    if any(weight.device.type == "cuda" for weight in network.parameters()):
        network.to(memory_format=torch.channels_last)  # what tensor cores want  # pyright: ignore
    if not packing_works():
        return
    for layer in network.modules():
        if any(weight.device.type != "cpu" for weight in layer.parameters(recurse=False)):
            continue
        if type(layer) is nn.Linear:
            layer.forward = _packed_linear(layer)
        elif type(layer) is nn.Conv2d and min(layer.weight.shape[:2]) >= FEW_CHANNELS:
            layer.forward = _packed_convolution(layer)


def remember_contexts(network: nn.Module) -> None:
    """From here on keys and values of a context are computed once while the same tensor is attended to.

    A sampling run gives the same context to each of its calls. Where gradients are taken, nothing is
    remembered.

    Args:
        network: in evaluation mode; its weights do not change any more.
    """
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            for layer in (block.cross_attention.to_k, block.cross_attention.to_v):
                layer.forward = _remembering(layer.forward)


def _remembering(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    known: list[
        tuple[Tensor, Tensor]
    ] = []  # guidance within an interval takes turns with two contexts

    def forward(input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return plain(input)
        for context, result in known:
            if context is input:
                return result
        known.append((input, plain(input)))
        del known[:-2]
        return known[-1][1]

    return forward


@cache
def packing_works() -> bool:
    """Whether this build of torch has the operators, and they give what the layers give."""
    with torch.no_grad():
        convolution = nn.Conv2d(16, 16, 3, padding=1, dtype=torch.bfloat16)
        linear = nn.Linear(16, 16, dtype=torch.bfloat16)
        x = torch.linspace(-1.0, 1.0, 1024, dtype=torch.bfloat16)
        try:
            pairs = (
                (_packed_convolution(convolution), convolution, x.view(1, 16, 8, 8)),
                (_packed_linear(linear), linear, x.view(64, 16)),
            )
            return all(
                torch.allclose(packed(given), plain(given), rtol=0.05, atol=0.02)
                for packed, plain, given in pairs
            )
        except (AttributeError, RuntimeError):  # another build of torch
            return False


def _packed_convolution(layer: nn.Conv2d) -> Callable[..., Tensor]:
    plain, packed = layer.forward, dict[torch.Size, Tensor]()

    def forward(input: Tensor) -> Tensor:
        x = input
        if torch.is_grad_enabled():  # these operators have no gradient
            return plain(x)
        how = ([*layer.padding], [*layer.stride], [*layer.dilation], layer.groups)
        if x.shape not in packed:
            _make_room(packed)
            packed[x.shape] = torch.ops.mkldnn._reorder_convolution_weight(
                layer.weight, *how, list(x.shape)
            )
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed[x.shape], layer.bias, *how, "none", [], ""
        )

    return forward


def _packed_linear(layer: nn.Linear) -> Callable[..., Tensor]:
    plain, packed = layer.forward, dict[int, Tensor]()

    def forward(input: Tensor) -> Tensor:
        x = input
        if torch.is_grad_enabled():
            return plain(x)
        rows = x.numel() // x.shape[-1]
        if rows not in packed:
            _make_room(packed)
            packed[rows] = torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows)
        return torch.ops.mkldnn._linear_pointwise(x, packed[rows], layer.bias, "none", [], "")

    return forward


def _make_room(packed: dict[Any, Tensor]) -> None:
    """Forget the oldest where there are too many."""
    if len(packed) >= SHAPES:
        del packed[next(iter(packed))]
