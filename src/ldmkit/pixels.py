"""8-bit pixels: from images, to PNG files and contact sheets."""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Pixels = UInt8[Tensor, "batch channels height width"]
Sheet = UInt8[Tensor, "channels _height _width"]


def to_pixels(images: Float[Tensor, "batch channels height width"]) -> Pixels:
    """Images in [-1, 1] (clipped) to 8-bit pixels, rounded to the nearest."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(path: Path, pixels: Sheet) -> None:
    """Write a PNG of one (grey) or three channels."""
    array = pixels.movedim(0, 2).numpy()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path, "PNG")


def grid(pixels: Pixels, columns: int, *, gap: int = 2) -> Sheet:
    """Lay pictures out in rows of `columns`, white between them."""
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
