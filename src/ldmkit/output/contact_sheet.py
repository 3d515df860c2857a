"""Many pictures on one sheet, small, in rows, with their names if wanted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldmkit.pixels import Sheet

MAX_PICTURES = 256
SIDE = 256
"""Pixels: larger pictures are made smaller, so that a sheet's memory is bounded."""
GAP = 2
LETTERS, LINES = 10, 2
"""Size of the letters, pixels, and lines of a name at most."""
NARROWEST = 96
"""Pixels that a name needs to be read."""
Small = UInt8[np.ndarray, "height width channels"]


class Thumbnail(NamedTuple):
    """One picture of a sheet."""

    pixels: Small
    """`[h, w, 1 or 3]`, no side longer than `SIDE`."""
    name: str
    group: str
    """What it was told: pictures of one group share rows where that is asked for."""


def thumbnail(pixels: Sheet, name: str, group: str) -> Thumbnail:
    """A picture as it stands in a sheet: as it is, or smaller where a side is longer than `SIDE`.

    Args:
        pixels: `[1 or 3, h, w]`.
        name: to be written under it.
        group: what it was told.
    """
    array = pixels.movedim(0, 2).numpy()
    if max(array.shape[:2]) > SIDE:
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
        array = np.asarray(image).reshape(image.height, image.width, -1)
    return Thumbnail(np.array(array), name, group)


def contact_sheet(
    pictures: Sequence[Thumbnail],
    *,
    columns: int | None = None,
    by_group: bool = False,
    labels: bool = False,
) -> UInt8[Tensor, "_channels _sheet_height _sheet_width"]:
    """Pictures in rows, white between them, each in a cell as large as the largest.

    Args:
        pictures: at least one, in order.
        columns: in a row at most; None for a square, or by group for the largest group.
        by_group: whether a group begins a new row; groups come in the order of their first picture.
        labels: whether names stand under the pictures.
    """
    rows = _rows(pictures, columns, by_group)
    height = max(one.pixels.shape[0] for one in pictures)
    width = max(one.pixels.shape[1] for one in pictures)
    below = 0
    if labels:
        width, below = max(width, NARROWEST), LINES * (LETTERS + 2)
    cell = (height + below + GAP, width + GAP)
    size = (len(rows) * cell[0] + GAP, max(map(len, rows)) * cell[1] + GAP)
    coloured = any(one.pixels.shape[2] == 3 for one in pictures)
    sheet = Image.new("RGB" if coloured else "L", (size[1], size[0]), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LETTERS)
    for number, row in enumerate(rows):
        for place, one in enumerate(row):
            corner = (GAP + place * cell[1], GAP + number * cell[0])
            pixels = one.pixels[:, :, 0] if one.pixels.shape[2] == 1 else one.pixels
            sheet.paste(Image.fromarray(pixels), corner)
            if labels:
                under = (corner[0], corner[1] + height)
                pen.multiline_text(under, _wrapped(one.name, font, width), "black", font, spacing=2)
    array = np.array(sheet).reshape(size[0], size[1], -1)
    return torch.from_numpy(array).movedim(2, 0)


def _rows(
    pictures: Sequence[Thumbnail], columns: int | None, by_group: bool
) -> list[list[Thumbnail]]:
    groups: dict[str, list[Thumbnail]] = {}
    for one in pictures:
        groups.setdefault(one.group if by_group else "", []).append(one)
    largest = max(map(len, groups.values()))
    width = columns or (largest if by_group else max(1, round(len(pictures) ** 0.5)))
    return [
        group[first : first + width]
        for group in groups.values()
        for first in range(0, len(group), width)
    ]


def _wrapped(name: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """A name in lines no wider than that, cut where there would be too many."""
    lines = [""]
    for sign in name:
        if font.getlength(lines[-1] + sign) > width:
            lines.append("")
        lines[-1] += sign
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1][:-2] + ".."]
    return "\n".join(lines)
