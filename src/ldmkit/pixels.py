"""From images to files: 8-bit pixels and contact sheets of them, 16 bits, numbers in their units."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8, UInt16
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


def save_png16(path: Path, image: OneImage) -> None:
    """Write one or three channels in [-1, 1] (clipped) as a 16-bit PNG, rounded to the nearest."""
    values = image.double().nan_to_num(0.0).add(1.0).mul(32767.5).round().clamp(0, 65535)
    array = values.movedim(0, 2).cpu().numpy().astype(np.uint16)
    if array.shape[2] == 1:
        Image.fromarray(array[:, :, 0]).save(path, "PNG")
    else:
        path.write_bytes(_png_of_colours(array))


def _png_of_colours(array: UInt16[np.ndarray, "height width 3"]) -> bytes:
    """A 16-bit RGB PNG, which Pillow does not write; lines as differences (PNG 3, 9.2: filter Up)."""
    height, width, _ = array.shape
    lines = array.astype(">u2").view(np.uint8).reshape(height, width * 6)
    differences = np.diff(lines, axis=0, prepend=np.zeros_like(lines[:1]))
    filtered = np.insert(differences, 0, 2, axis=1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def save_npy(path: Path, image: OneImage, value_range: tuple[float, float]) -> None:
    """Write float32 numbers as `[h, w]` (one channel) or `[h, w, c]`, -1 and 1 as the range's ends.

    Nothing is clipped: what lies a little outside of [-1, 1] is outside of the range.
    """
    low, high = value_range
    values = image.double() * ((high - low) / 2) + (low + high) / 2
    array = values.float().cpu().movedim(0, 2).numpy()
    with path.open("wb") as file:  # given a name, NumPy would add a suffix
        np.save(file, array[:, :, 0] if array.shape[2] == 1 else array, allow_pickle=False)


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
