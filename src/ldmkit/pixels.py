"""From images to 8-bit pixels, and to contact sheets of them."""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Pixels = UInt8[Tensor, "batch channels height width"]
Sheet = UInt8[Tensor, "_channels _height _width"]
OneImage = Float[Tensor, "channels height width"]


def to_pixels(images: Float[Tensor, "batch channels height width"]) -> Pixels:
    """Images in [-1, 1] (clipped) to 8-bit pixels, rounded to the nearest; NaN becomes mid-grey."""
    pixels = images.float().nan_to_num(0.0).add(1.0).mul(127.5)
    return pixels.round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(path: Path, pixels: Sheet) -> None:
    """Write a PNG of one (grey) or three channels."""
    array = pixels.movedim(0, 2).numpy()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path, "PNG")


def shown(pixels: Pixels) -> UInt8[Tensor, "batch _shown height width"]:
    """What can be seen of any number of channels: the first three, or of one or two the first."""
    return pixels[:, : 3 if pixels.shape[1] >= 3 else 1]


def grid(pixels: Pixels, columns: int, *, gap: int = 2) -> Sheet:
    """Lay pictures out in rows of `columns`, white between them; see `shown` for their channels."""
    pixels = shown(pixels)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full(
        (channels, rows * (height + gap) + gap, columns * (width + gap) + gap),
        255,
        dtype=torch.uint8,
    )
    for number, picture in enumerate(pixels):
        top = gap + (number // columns) * (height + gap)
        left = gap + (number % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = picture
    return sheet
