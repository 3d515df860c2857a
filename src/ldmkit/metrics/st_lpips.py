"""The networks of ST-LPIPS, the shift-tolerant perceptual similarity (Ghildyal and Liu 2022).

The distance has LPIPS' form (`autoencoder.perceptual`); what differs is the network, which blurs
before each subsampling and was trained with the heads on human judgements. Here are the networks and
their weight files, as published (`alex_shift_tolerant.pth`, `vgg_shift_tolerant.pth`) or the same
tensors as safetensors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.errors import DataError
from ldmkit.unpickling import read_tensors

FeatureMap = Float[Tensor, "batch channels _y _x"]
Convolution = tuple[int, int, int, int]
"""Channels in and out, kernel side, padding."""
MIN_SIZE = 24
"""Smallest side of a picture, pixels: below, a map is too small for its blur's mirrored border."""


class BlurPool(nn.Module):
    """Blur with a small kernel for each channel, and take every second pixel (Zhang 2019).

    The border is mirrored by two pixels, so a side n becomes (n + 3) // 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, x: FeatureMap) -> FeatureMap:
        """Map `[b, c, h, w]` to about half the height and width."""
        kernel = self.get_buffer("filt")
        return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), kernel, stride=2, groups=len(kernel))


class TappedNetwork(nn.Module):
    """Slices run one after another; the output of each is a feature map of the distance.

    Args:
        slices: layers with the numbers that the weight file has in its names.
    """

    def __init__(self, slices: Sequence[dict[int, nn.Module]]) -> None:
        super().__init__()
        for number, layers in enumerate(slices, 1):
            named = nn.Sequential()
            for index, layer in layers.items():
                named.add_module(str(index), layer)
            self.add_module(f"slice{number}", named)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Five feature maps of normalised RGB images `[b, 3, h, w]`, sides of 24 or more."""
        maps = []
        for slice_ in self.children():
            images = slice_(images)
            maps.append(images)
        return maps


class STLPIPSParts(NamedTuple):
    """What a distance is made of."""

    name: str
    """`st-lpips-alex` or `st-lpips-vgg`."""
    network: TappedNetwork
    heads: list[Tensor]
    """For each feature map the channels' weights `[1, c, 1, 1]`."""


def alex_network() -> TappedNetwork:
    """AlexNet with stride 1 in its first convolution, and blurs where it would subsample."""
    return TappedNetwork(
        [
            {0: nn.Conv2d(3, 64, 11, padding=2), 1: BlurPool(64), 2: nn.ReLU()},
            _after_pool(3, 64, [(64, 192, 5, 2)], window=3),
            _after_pool(7, 192, [(192, 384, 3, 1)], window=3),
            _convolutions(11, [(384, 256, 3, 1)]),
            _convolutions(13, [(256, 256, 3, 1)]),
        ]
    )


def vgg_network() -> TappedNetwork:
    """VGG16 up to relu5_3, its pools split into maximum and blur."""
    slices = [_convolutions(0, [(3, 64, 3, 1), (64, 64, 3, 1)])]
    first = 4
    for channels, out_channels, depth in (
        (64, 128, 2),
        (128, 256, 3),
        (256, 512, 3),
        (512, 512, 3),
    ):
        rest = [(out_channels, out_channels, 3, 1)] * (depth - 1)
        slices.append(
            _after_pool(first, channels, [(channels, out_channels, 3, 1), *rest], window=2)
        )
        first += len(slices[-1])
    return TappedNetwork(slices)


def load_st_lpips(path: Path) -> STLPIPSParts:
    """The network and heads of a weight file; which of the two it is, its tensors say.

    Raises:
        DataError: the file cannot be read or is no ST-LPIPS; the message names the first difference.
    """
    tensors = read_tensors(path)
    stem = tensors.get("net.slice1.0.weight")
    alex = stem is not None and stem.shape[-1] == 11
    network = alex_network() if alex else vgg_network()
    wanted = {f"net.{name}": tensor.shape for name, tensor in network.state_dict().items()}
    widths = [64, 192, 384, 256, 256] if alex else [64, 128, 256, 512, 512]
    wanted |= {f"lin{i}.model.1.weight": torch.Size([1, c, 1, 1]) for i, c in enumerate(widths)}
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            raise DataError(f"{path} is no ST-LPIPS network: it lacks {name} of {list(shape)}")
    network.load_state_dict({name: tensors[f"net.{name}"].float() for name in network.state_dict()})
    heads = [tensors[f"lin{number}.model.1.weight"].float() for number in range(len(widths))]
    return STLPIPSParts(f"st-lpips-{'alex' if alex else 'vgg'}", network, heads)


def _after_pool(
    first: int, channels: int, convolutions: Sequence[Convolution], *, window: int
) -> dict[int, nn.Module]:
    """Maximum, blur, then convolutions; layers are counted from `first`."""
    pool = {first: nn.MaxPool2d(window, stride=1), first + 1: BlurPool(channels)}
    return pool | _convolutions(first + 2, convolutions)


def _convolutions(first: int, convolutions: Sequence[Convolution]) -> dict[int, nn.Module]:
    layers: dict[int, nn.Module] = {}
    for number, (channels, out_channels, side, padding) in enumerate(convolutions):
        layers[first + 2 * number] = nn.Conv2d(channels, out_channels, side, padding=padding)
        layers[first + 2 * number + 1] = nn.ReLU()
    return layers
