"""Layers in bfloat16 on the CPU with weights laid out once, and pixels stored channels last.

oneDNN puts the weights of a convolution or linear layer into an order of its own at each call. On
small maps that takes as long as the multiplication. `torch.compile` with freezing lays them out once, by the
operators that are used here; they are private to torch, so each is tried before it is relied on.

Such an operator may add up in another order for another number of rows, and a sample must not depend on
what was drawn beside it. So a row is defined as what it is in a pair: before a layer's first batch of a size
it is tried whether the order is the same, and where it is not, the layer goes pair by pair.
"""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmkit.networks.blocks import ResidualConv2d, Upsample
from ldmkit.networks.channels_last import CHANNELS_LAST, FAST_PIXELS
from ldmkit.networks.transformer import GatedFeedForward

SHAPES = 4
"""Of inputs for which a layer keeps its packed weights at most; pictures in buckets have many."""
SLOW_PIXELS = range(17, FAST_PIXELS)
"""Sizes of maps on which torch's group norm takes four times as long with channels last."""
IMAGES = 4
"""Axes of a batch of maps."""

PAIR = 2
"""Rows beside which a row is what it is by definition."""

Forward = Callable[..., Tensor]
"""Of a batch, and of what the result is added to where the layer does that."""


class Weights(dict[Hashable, Any]):
    """Packed weights of a layer, by the shape of its input."""

    def of(self, shape: Hashable, packed: Callable[[], Any]) -> Any:  # noqa: ANN401 - one or two tensors
        """The weights for a shape."""
        if shape not in self:
            if len(self) >= SHAPES:
                del self[next(iter(self))]
            self[shape] = packed()
        return self[shape]


class Packed:
    """How a layer computes from now on; what it gives for a row does not depend on how many there are.

    Where gradients are taken, it computes as it did, pair by pair.

    Args:
        layer: of one of `KINDS`.
        alike: what was found of layers of the same description and inputs; shared and added to.
    """

    def __init__(self, layer: nn.Module, alike: dict[Hashable, bool]) -> None:
        self._layer, self._plain, self._alike = layer, layer.forward, alike
        self._packed = KINDS[type(layer)](layer, Weights())
        self._described = repr(layer)  # takes as long as a small layer

    def __call__(self, x: Tensor, *onto: Tensor) -> Tensor:
        """As `layer.forward`."""
        if torch.is_grad_enabled():
            return in_pairs(self._plain, x, *onto)
        if len(x) == PAIR or self._rows_are_alike(x, *onto):
            return self._packed(x, *onto)
        return in_pairs(self._packed, x, *onto)

    def _rows_are_alike(self, x: Tensor, *onto: Tensor) -> bool:
        case = (self._described, x.shape, len(onto), torch.get_num_threads())
        if case not in self._alike:
            self._alike[case] = rows_are_alike(self._layer, x, *onto)
        return self._alike[case]


def pack(network: nn.Module) -> None:
    """Replace how the layers of a network compute: bfloat16, on the CPU.

    The tensors and their names stay.

    Args:
        network: its weights do not change any more.
    """
    alike: dict[Hashable, bool] = {}
    for layer in network.modules():
        here = all(weight.device.type == "cpu" for weight in layer.parameters())
        if here and type(layer) in KINDS:
            layer.forward = Packed(layer, alike)


def is_packed(network: nn.Module) -> bool:
    """Whether `pack` has been at a network, so that it can be given any batch."""
    return any(isinstance(vars(layer).get("forward"), Packed) for layer in network.modules())


@torch.no_grad()
def rows_are_alike(layer: nn.Module, x: Tensor, *onto: Tensor) -> bool:
    """Whether a packed layer adds up in the same order for a batch like this as for a pair.

    It is tried with rows that are all the same and products that cancel, so that all that comes out is what
    rounding leaves of them: another order shows in nearly every number, which it would hardly ever after
    rounding to bfloat16.
    """
    if isinstance(layer, nn.GroupNorm):
        return _rows_are_added_up_whole(x)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return False
    axis = 1 if isinstance(layer, (nn.Conv2d, Upsample)) else x.dim() - 1
    generator = torch.Generator().manual_seed(0)
    compute = KINDS[type(layer)](_of_cancelling_weights(layer, generator), Weights())
    row = _cancelling(x[:1].shape, axis, generator, -1.0)
    many, pair = (
        compute(
            row.repeat(count, *[1] * (x.dim() - 1)),
            *(torch.zeros_like(one[:1]).repeat(count, 1, 1, 1) for one in onto),
        )
        for count in (len(x), PAIR)
    )
    return bool((many == pair[:1]).all() and (pair == pair[:1]).all())


def _cancelling(shape: torch.Size, axis: int, generator: torch.Generator, sign: float) -> Tensor:
    """Noise whose second half along an axis is the first one, with a sign."""
    half, odd = divmod(shape[axis], 2)
    first = torch.randn(*shape[:axis], half, *shape[axis + 1 :], generator=generator)
    rest = torch.zeros(*shape[:axis], odd, *shape[axis + 1 :])
    return torch.cat([first, sign * first, rest], dim=axis).bfloat16()


def _of_cancelling_weights(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A layer of the same shape that weighs the second half of its inputs as the first, without bias."""
    with torch.device("meta"):  # no memory, and no random numbers are drawn
        if isinstance(layer, Upsample):
            probe = Upsample(layer.conv.in_channels)
            probe.conv = cast(nn.Conv2d, _of_cancelling_weights(layer.conv, generator))
            return probe
        if isinstance(layer, GatedFeedForward):
            probe = GatedFeedForward(layer.expand.in_features)
            probe.expand = cast(nn.Linear, _of_cancelling_weights(layer.expand, generator))
            probe.contract = cast(nn.Linear, nn.Identity())  # is tried by itself
            return probe
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, cast(Any, layer.kernel_size))
            probe = nn.Conv2d(*sizes, bias=False)
            probe.stride, probe.padding = layer.stride, layer.padding
            probe.dilation = layer.dilation
        else:
            probe = nn.Linear(*reversed(cast(Tensor, layer.weight).shape), bias=False)
    with torch.device("cpu"):
        weight = _cancelling(probe.weight.shape, 1, generator, 1.0)
    probe.weight = nn.Parameter(weight, requires_grad=False)
    return probe


def in_pairs(compute: Forward, *given: Tensor) -> Tensor:
    """Two rows of each at a time; a lone one goes beside itself."""
    count = len(given[0])
    if count == PAIR:
        return compute(*given)
    results = [
        compute(*(one[first : first + PAIR] for one in given))
        for first in range(0, count - 1, PAIR)
    ]
    if count % PAIR:
        results.append(compute(*(torch.cat([one[-1:], one[-1:]]) for one in given))[:1])
    return torch.cat(results)


@cache
def packing_works() -> bool:
    """Whether this build of torch has the operators, and they give what the layers give."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.linspace(-1.0, 1.0, 1024, dtype=torch.bfloat16)
        tokens, image = x.view(1, 64, 16), x.view(1, 16, 8, 8)
        tried: tuple[tuple[nn.Module, tuple[Tensor, ...]], ...] = (
            (nn.Linear(16, 16), (tokens,)),
            (GatedFeedForward(16), (tokens,)),
            (nn.Conv2d(16, 16, 3), (image,)),
            (ResidualConv2d(16, 16, 3, padding=1), (image, image)),
            (Upsample(16), (image,)),
        )
        try:
            return all(
                torch.allclose(
                    KINDS[type(layer)](layer, Weights())(*given),
                    layer(*given),
                    rtol=0.05,
                    atol=0.02,
                )
                for layer, given in ((one.bfloat16(), given) for one, given in tried)
            )
        except (AttributeError, RuntimeError):  # another build of torch
            return False


def _packed_convolution(layer: nn.Conv2d, weights: Weights) -> Forward:
    def forward(x: Tensor, onto: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=CHANNELS_LAST)
        how = ([*layer.padding], [*layer.stride], [*layer.dilation], layer.groups)
        weight = weights.of(
            x.shape,
            lambda: torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *how, [*x.shape]),
        )
        if onto is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, layer.bias, *how, *ALONE)
        onto = onto.contiguous(memory_format=CHANNELS_LAST)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, onto, weight, layer.bias, *how, *ADDED
        )

    return forward


def _packed_linear(layer: nn.Linear, weights: Weights) -> Forward:
    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        weight = weights.of(rows, lambda: _linear_weight(layer.weight, rows))
        return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, *ALONE)

    return forward


def _packed_upsample(layer: Upsample, weights: Weights) -> Forward:
    """Of both ways to compute it the one that the layer would take."""
    padding, of_output, stride, dilation, groups = [1, 1], [0, 0], [2, 2], [1, 1], 1
    how = (padding, of_output, stride, dilation, groups)

    def forward(x: Tensor) -> Tensor:
        if not layer.is_folded(x):
            return layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = x.contiguous(memory_format=CHANNELS_LAST)
        weight = weights.of(
            x.shape,
            lambda: torch.ops.mkldnn._reorder_convolution_transpose_weight(
                layer.folded(), *how, [*x.shape]
            ),
        )
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, weight, layer.conv.bias, *how, *ALONE
        )

    return forward


def _packed_feed_forward(layer: GatedFeedForward, weights: Weights) -> Forward:
    """GELU and the product become part of the two halves of the first linear layer."""
    value, gate = layer.expand.weight.chunk(2)
    biases = (None, None) if layer.expand.bias is None else layer.expand.bias.chunk(2)

    def forward(tokens: Tensor) -> Tensor:
        rows = tokens.numel() // tokens.shape[-1]
        first, second = weights.of(
            rows, lambda: (_linear_weight(value, rows), _linear_weight(gate, rows))
        )
        gates = torch.ops.mkldnn._linear_pointwise(tokens, second, biases[1], "gelu", [], "none")
        gated = torch.ops.mkldnn._linear_pointwise.binary(tokens, gates, first, biases[0], "mul")
        return layer.contract(gated)

    return forward


def _packed_group_norm(layer: nn.GroupNorm, weights: Weights) -> Forward:
    """On small maps as if channels were not last; on large ones many threads share a sample's sum."""
    del weights  # they are not matrices
    plain = layer.forward

    def forward(x: Tensor) -> Tensor:
        pixels = _pixels(x)
        if pixels in SLOW_PIXELS:
            return plain(x.contiguous()).contiguous(memory_format=CHANNELS_LAST)
        if pixels >= FAST_PIXELS and torch.get_num_threads() > PAIR and len(x) > 1:
            return torch.cat([plain(row) for row in x.split(1)])  # its bounds depend on its place
        return plain(x)

    return forward


def _rows_are_added_up_whole(x: Tensor) -> bool:
    """By a group norm: a large map's pixels are divided among threads, rows only where it comes out even."""
    threads = torch.get_num_threads()
    return _pixels(x) < FAST_PIXELS or (threads <= PAIR and len(x) % threads == 0)


def _pixels(x: Tensor) -> int:
    """Of a map; other inputs count as one."""
    return x.shape[2] * x.shape[3] if x.dim() == IMAGES else 1


def _linear_weight(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


ALONE: tuple[str, list[float], str] = ("none", [], "")
"""Nothing is done to what an operator gives."""
ADDED = ("add", None, None, [], None)
"""It is added to another map."""
KINDS: dict[type[nn.Module], Callable[[Any, Weights], Forward]] = {
    nn.Conv2d: _packed_convolution,
    ResidualConv2d: _packed_convolution,
    nn.Linear: _packed_linear,
    nn.GroupNorm: _packed_group_norm,
    Upsample: _packed_upsample,
    GatedFeedForward: _packed_feed_forward,
}
