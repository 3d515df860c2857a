"""Circular convolutions: networks whose maps continue at the opposite border.

A network of convolutions, attention and norms that treat all places alike then gives for a picture
that is rolled around the torus what it gives for the picture, rolled; so its pictures tile.
"""

from typing import Any

import torch.nn.functional as F
from torch import nn

from ldmkit.canvas_configs import Seamless

Axes = tuple[bool, bool]
"""Whether along y, along x."""
AXES: dict[Seamless, Axes] = {
    "none": (False, False),
    "x": (False, True),
    "y": (True, False),
    "both": (True, True),
}
"""The words of options."""


def wrap_convolutions(network: nn.Module, axes: Axes) -> None:
    """From here on the convolutions of a network pad circularly along these axes, not with zeros.

    The tensors keep their names. Rolling the input by a multiple of the total stride rolls the result.

    Args:
        network: whose convolutions pad with zeros on all sides, as the U-Net's and the decoder's do.
        axes: along which; the others stay as they are.

    Raises:
        ValueError: a convolution looks beyond its cell and does not pad with zeros: the encoder's stride of
            2, or one that is circular already.
    """
    if not any(axes):
        return
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1):
            continue
        if tuple(2 * side + 1 for side in _padding(layer)) != layer.kernel_size:
            raise ValueError(f"{name} pads by {layer.padding}: it cannot be made circular")
        _wrap(layer, axes)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return 0, 0
    return layer.padding[0], layer.padding[1]


def _wrap(layer: nn.Conv2d, axes: Axes) -> None:
    """Pad before the layer, and take that padding from the layer itself."""
    y, x = (side if wraps else 0 for side, wraps in zip(_padding(layer), axes, strict=True))
    pad = (x, x, y, y)
    layer.padding = (_padding(layer)[0] - y, _padding(layer)[1] - x)

    def around(module: nn.Module, inputs: tuple[Any, ...]) -> Any:  # noqa: ANN401 - of a hook
        del module
        return F.pad(inputs[0], pad, mode="circular")

    layer.register_forward_pre_hook(around)
