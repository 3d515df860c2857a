"""Large pictures in tiles: encoder and decoder in the memory of one tile.

Two ways; either is called like the network itself.

- **exact**: layer by layer. The feature maps of the whole picture lie in main memory (or in a file),
  each layer is computed tile by tile on the device, and a tile reads the one or two cells around it
  that the layer's 3x3 kernel reaches. Group norms take their statistics from the whole map, attention
  sees the whole map, and the result is that of the whole picture up to rounding.
- **independent**: each tile, with as much around it as the network's receptive field reaches, goes
  through the whole network by itself. Nothing is larger than a tile, but group norms and attention
  see only that tile, so the result differs; without them it would be the same.

In both a tile at the picture's border ends there, so that the zeros a convolution pads with stand
where they stand for the whole picture.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.networks import Decoder, Downsample, Encoder
from ldmkit.errors import DataError, UsageError
from ldmkit.networks.blocks import (
    FeatureMap,
    PixelRMSNorm,
    ResidualBlock,
    SpatialAttention,
    Upsample,
)

Network = Encoder | Decoder
Layer = Callable[[FeatureMap], FeatureMap]
NewMap = Callable[[Sequence[int]], Tensor]
"""Makes an uninitialised float32 tensor in main memory, or one that a file backs."""


class Place(NamedTuple):
    """Where tiles are computed, and where whole maps lie."""

    device: torch.device
    new_map: NewMap


Way = Callable[[Network, FeatureMap, int, Place], Tensor]
"""Maps as the network does, in tiles of that side, to main memory."""


def compute_in_tiles(
    model: Autoencoder, tile: int, *, exact: bool = True, scratch: Path | None = None
) -> None:
    """From here on `model.encode` and `model.decode` compute in tiles, without gradients.

    The weights stay where they are, and there the tiles are computed. Pictures may be of any size
    that is a multiple of the factor and may be backed by a memory map; decoded ones are on the CPU.

    Args:
        model: in evaluation mode. Its tensors have other names from then on: save it before.
        tile: side of a tile in pixels of the picture.
        exact: as the module says; otherwise independent.
        scratch: directory for the feature maps of the exact way; None keeps them in memory.

    Raises:
        UsageError: the tile is not a multiple of the autoencoder's factor.
    """
    factor = model.config.factor
    if tile % factor:
        raise UsageError(f"--tile {tile} is not a multiple of the autoencoder's factor {factor}")
    new_map = in_memory if scratch is None else file_backed(scratch)
    way = layer_by_layer if exact else tile_by_tile
    parts = (("encoder", model.encoder, tile), ("decoder", model.decoder, tile // factor))
    for name, network, side in parts:
        if isinstance(network, Network):  # the identity computes nothing
            model.add_module(name, TiledNetwork(network, side, way, new_map))


class TiledNetwork(nn.Module):
    """An encoder or decoder that computes in tiles.

    Args:
        network: the encoder or decoder.
        side: of a tile, in input cells (pixels, latents).
        way: how; `layer_by_layer` or `tile_by_tile`.
        new_map: makes the result, and the feature maps where there are any.
    """

    def __init__(self, network: Network, side: int, way: Way, new_map: NewMap) -> None:
        super().__init__()
        self.network, self.side, self.way, self.new_map = network, side, way, new_map

    @torch.no_grad()
    def forward(self, x: FeatureMap) -> FeatureMap:
        """Map as the network does.

        Args:
            x: on any device, or backed by a memory map.

        Returns:
            An encoder's result on the network's device, a decoder's in main memory.

        Raises:
            DataError: the sides of a picture are not multiples of the factor.
        """
        height, width = x.shape[2:]
        cell = cells_of(self.network)
        if height % cell or width % cell:
            raise DataError(
                f"a picture of {width} x {height} pixels cannot be encoded: its sides must be "
                f"multiples of {cell}"
            )
        device = self.network.conv_in.weight.device
        result = self.way(self.network, x, self.side, Place(device, self.new_map))
        return result.to(device) if isinstance(self.network, Encoder) else result


def tile_by_tile(network: Network, x: FeatureMap, side: int, place: Place) -> Tensor:
    """The independent way, to main memory."""
    cell = cells_of(network)
    halo = -(-max(reach(network)) // cell) * cell
    return over_tiles(network, x, side, halo, place)


def layer_by_layer(network: Network, x: FeatureMap, side: int, place: Place) -> Tensor:
    """The exact way, to main memory, which holds the maps of two layers, of three where widths change."""
    h = _tiled(network.conv_in, x, side, place)
    for stage in stages(network):
        if isinstance(stage, ResidualBlock):
            h = _residual(stage, h, side, place)
        elif isinstance(stage, SpatialAttention):
            h = stage(h.to(place.device)).to(h.device)
        else:
            h = _tiled(stage, h, side, place)
        if isinstance(stage, Downsample):
            side //= 2  # the same part of the picture at every level
        elif isinstance(stage, Upsample):
            side *= 2
    return _normalised(network.norm_out, network.conv_out, h, side, place)


def _tiled(layer: Layer, x: Tensor, side: int, place: Place, onto: Tensor | None = None) -> Tensor:
    halo = 2 if isinstance(layer, Downsample) else 1  # a stride of 2 starts at even cells
    return over_tiles(layer, x, side, halo, place, onto)


def _residual(block: ResidualBlock, x: Tensor, side: int, place: Place) -> Tensor:
    h = _normalised(block.norm1, block.conv1, x, side, place)
    widened = isinstance(block.skip, nn.Conv2d)
    x = _tiled(block.skip, x, side, place) if widened else x
    return _normalised(block.norm2, block.conv2, h, side, place, onto=x)


def _normalised(
    norm: nn.GroupNorm | PixelRMSNorm,
    conv: nn.Conv2d,
    x: Tensor,
    side: int,
    place: Place,
    onto: Tensor | None = None,
) -> Tensor:
    """Norm, SiLU, convolution; a group norm as one scale and shift for each channel of the map."""
    if isinstance(norm, PixelRMSNorm):  # sees one pixel at a time, in whatever tile
        return _tiled(lambda window: conv(F.silu(norm(window))), x, side, place, onto)
    grouped = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    each = x.shape[1] // norm.num_groups
    deviation = (variance + norm.eps).rsqrt().repeat_interleave(each, dim=1).to(place.device)
    mean = mean.repeat_interleave(each, dim=1).to(place.device)
    scale = (deviation * norm.weight)[:, :, None, None]
    shift = norm.bias[None, :, None, None] - mean[:, :, None, None] * scale

    def layer(window: Tensor) -> Tensor:
        return conv(F.silu(torch.addcmul(shift, window, scale), inplace=True))

    return _tiled(layer, x, side, place, onto)


class Span(NamedTuple):
    """One tile along one side: what is read, and what of the result is kept; in input cells."""

    read: tuple[int, int]
    keep: tuple[int, int]

    def kept(self, ratio: Fraction) -> tuple[slice, slice]:
        """Where the result goes in the whole map, and which part of the window's result that is."""
        start, stop, skipped = (
            int(cells * ratio) for cells in (*self.keep, self.keep[0] - self.read[0])
        )
        return slice(start, stop), slice(skipped, skipped + stop - start)


def spans(length: int, side: int, halo: int) -> Iterator[Span]:
    """Divide `length` cells into tiles that read `halo` cells or more on each side, where there are any.

    All read the same number of cells: windows of several sizes doubled the peak memory, because
    blocks that were freed fitted no later window.
    """
    width = min(length, side + 2 * halo)
    for start in range(0, length, side):
        first = min(max(0, start - halo), length - width)
        yield Span((first, first + width), (start, min(start + side, length)))


def over_tiles(
    layer: Layer, x: Tensor, side: int, halo: int, place: Place, onto: Tensor | None = None
) -> Tensor:
    """Compute `layer(x)` one window of `x` at a time.

    Args:
        layer: local: a kept value depends on at most `halo` cells around it. May change resolution.
        x: `[b, c, y, x]`, anywhere.
        side: of a tile, in cells of `x`.
        halo: in cells of `x`.
        place: where `layer` computes, and what makes the result.
        onto: add to this map in place, instead of making one.
    """
    result = onto
    for rows in spans(x.shape[2], side, halo):
        for columns in spans(x.shape[3], side, halo):
            window = x[:, :, slice(*rows.read), slice(*columns.read)].to(place.device)
            values = layer(window)
            ratio = Fraction(values.shape[2], window.shape[2])
            if result is None:
                sides = (int(length * ratio) for length in x.shape[2:])
                result = place.new_map((*values.shape[:2], *sides))
            (y, kept_y), (x_, kept_x) = rows.kept(ratio), columns.kept(ratio)
            kept = values[:, :, kept_y, kept_x].to(result.device)
            if onto is None:
                result[:, :, y, x_] = kept
            else:
                result[:, :, y, x_] += kept
    if result is None:
        raise DataError("a picture without pixels has no tiles")
    return result


def stages(network: Network) -> list[nn.Module]:
    """What lies between `conv_in` and `norm_out`, in the order it is run."""
    middle = list(network.middle.children())
    levels = [stage for level in network.levels for stage in level.children()]
    return levels + middle if isinstance(network, Encoder) else middle + levels


def cells_of(network: Network) -> int:
    """Input cells to one latent along each side: the factor for an encoder, 1 for a decoder."""
    return 2 ** (len(network.levels) - 1) if isinstance(network, Encoder) else 1


def reach(network: Network | nn.Identity) -> tuple[int, int]:
    """How far the network looks, apart from its norms and attention.

    Returns:
        Input cells (pixels, latents) before and after its own that the output of one latent's place
        depends on, along each side.
    """
    if isinstance(network, nn.Identity):
        return 0, 0
    start, stop = 0, 1 if isinstance(network, Encoder) else 2 ** (len(network.levels) - 1)
    for stage in (network.conv_out, *reversed(stages(network)), network.conv_in):
        match stage:
            case ResidualBlock():
                start, stop = start - 2, stop + 2
            case Downsample():  # its zeros are at the right and bottom: it looks only there
                start, stop = 2 * start, 2 * stop + 1
            case Upsample():
                start, stop = (start - 1) // 2, (stop + 2) // 2
            case nn.Conv2d():
                start, stop = start - 1, stop + 1
    return -start, stop - cells_of(network)


def in_memory(shape: Sequence[int]) -> Tensor:
    """A feature map in main memory."""
    return torch.empty(tuple(shape))


def file_backed(directory: Path) -> NewMap:
    """Feature maps in files of that directory, for pictures whose maps exceed the memory.

    A file has no name once its map is made, and is gone with the map whatever happens.
    """

    def new_map(shape: Sequence[int]) -> Tensor:
        directory.mkdir(parents=True, exist_ok=True)
        count = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            if hasattr(os, "posix_fallocate"):  # no space is then an error here, not a crash later
                os.posix_fallocate(file.fileno(), 0, 4 * count)
            return torch.from_file(file.name, shared=True, size=count).view(tuple(shape))

    return new_map
