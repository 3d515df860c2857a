"""Where a picture comes to lie in the network's input: resized, cut, mirrored.

Computed from sizes alone, so that what belongs to the picture (its mask, label map, boxes) goes
through the very same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.items import Box
from ldmkit.errors import DataError

SMALLEST_BOX = 1e-3
"""Shares of a side below which what is left of a box says nothing any more."""


class Placement(NamedTuple):
    """First the whole picture is resized, then a window cut out of it, then that is mirrored."""

    resized: tuple[int, int]
    """Height and width of the whole picture, pixels."""
    top: int
    left: int
    """Corner of the window in the resized picture, pixels."""
    size: tuple[int, int]
    """Height and width of the window, pixels."""
    mirror: bool = False
    """Left becomes right."""


def place(
    shape: Sequence[int],
    config: PreprocessingConfig,
    draw: torch.Generator | None,
    *,
    size: tuple[int, int] | None = None,
    zoom: float = 1.0,
    name: str = "the picture",
) -> Placement:
    """Fill a window with a picture: one side fits, the other is cut.

    Args:
        shape: height and width of the picture, pixels.
        config: size, resize, crop, flip.
        draw: decides random crops and flips; None for the centre and no flip (encoding, evaluation).
        size: height and width of the window; None for the square that the config asks for.
        zoom: how much larger than needed the picture is made; 1 = as small as fills the window.
        name: how to call the picture in errors.

    Raises:
        DataError: the config allows no resizing or no cutting, and the picture would need it.
    """
    size = size or (config.size, config.size)
    resized = _resized(shape, size, zoom)
    if config.resize == "none":
        resized = (shape[0], shape[1])
        if resized[0] < size[0] or resized[1] < size[1]:
            raise DataError(
                f"{name} has {shape[1]} x {shape[0]} pixels, fewer than {size[1]} x {size[0]}, and "
                "--preprocessing.resize none does not enlarge: take a smaller size, or leave it out"
            )
    spare_y, spare_x = resized[0] - size[0], resized[1] - size[1]
    if config.crop == "none" and (spare_y or spare_x):
        raise DataError(
            f"{name} has {shape[1]} x {shape[0]} pixels, which does not fit {size[1]} x {size[0]}, and "
            "--preprocessing.crop none does not cut: give pictures of that shape, or another crop"
        )
    if draw is None:
        return Placement(resized, spare_y // 2, spare_x // 2, size)
    share_y, share_x, mirror = torch.rand(3, generator=draw).tolist()
    top, left = spare_y // 2, spare_x // 2
    if config.crop == "random":
        top, left = int(share_y * (spare_y + 1)), int(share_x * (spare_x + 1))
    return Placement(resized, top, left, size, config.flip and mirror < 0.5)


def place_boxes(boxes: Sequence[Box], placement: Placement) -> tuple[Box, ...]:
    """Boxes as shares of the window: cut to it, and left out where nothing of them is to be seen."""
    placed = []
    for box in boxes:
        x0, x1 = (_along(x, placement, axis=1) for x in (box.x0, box.x1))
        y0, y1 = (_along(y, placement, axis=0) for y in (box.y0, box.y1))
        if placement.mirror:
            x0, x1 = 1.0 - x1, 1.0 - x0
        if min(x1 - x0, y1 - y0) >= SMALLEST_BOX:
            placed.append(Box(box.category, x0, y0, x1, y1))
    return tuple(placed)


def _resized(shape: Sequence[int], size: tuple[int, int], zoom: float) -> tuple[int, int]:
    scale = max(size[0] / shape[0], size[1] / shape[1]) * zoom
    return max(size[0], round(shape[0] * scale)), max(size[1], round(shape[1] * scale))


def _along(share: float, placement: Placement, *, axis: int) -> float:
    """A share of the picture's side as a share of the window's, within it."""
    start = (placement.top, placement.left)[axis]
    pixels = share * placement.resized[axis] - start
    return min(max(pixels / placement.size[axis], 0.0), 1.0)
