"""Boxes as people write them, and boxes as people look at them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldmkit.conditioning.classes import class_index
from ldmkit.data.items import Box

ROUNDING = 1e-3
"""How far a box may stick out by the rounding of its numbers, in shares of the picture's side."""
KEYS = {"label", "box"}
COLOURS = ("red", "blue", "lime", "orange", "magenta", "cyan", "yellow", "purple")


def boxes_of_json(
    objects: object, names: Sequence[str], picture_size: tuple[int, int] | None = None
) -> tuple[Box, ...]:
    """Boxes from what JSON gives: `[{"label": "dog", "box": [x, y, width, height]}, ...]`.

    Args:
        objects: the list; a label is a name or an index, x and y are of the upper left corner.
        names: of the box classes.
        picture_size: width and height of the picture, pixels, where boxes are in pixels; None where
            they are in shares of it, 0 to 1.

    Raises:
        ValueError: one of them is no box in the picture, or of no known class.
    """
    if not isinstance(objects, list):
        raise ValueError(
            f"boxes are a list such as "
            f'[{{"label": "{names[0] if names else 0}", "box": [0.1, 0.2, 0.5, 0.6]}}]'
        )
    return tuple(
        _box(entry, f"box {number}", names, picture_size)
        for number, entry in enumerate(objects, start=1)
    )


def draw_boxes(
    pictures: UInt8[Tensor, "n 3 y x"], boxes: Sequence[Sequence[Box]], names: Sequence[str]
) -> UInt8[Tensor, "n 3 y x"]:
    """Copies of pictures with their boxes and class names drawn on them, for previews.

    Args:
        pictures: RGB, on the CPU.
        boxes: of each picture, in shares of its sides; one colour for each class.
        names: of the classes; a class without a name shows its number.

    Raises:
        ValueError: there are not as many lists of boxes as pictures.
    """
    if len(pictures) != len(boxes):
        raise ValueError(f"{len(pictures)} pictures and {len(boxes)} lists of boxes were given")
    drawn = [_drawn(*pair, names) for pair in zip(pictures, boxes, strict=True)]
    return torch.stack(drawn) if drawn else pictures.clone()


def _box(
    entry: object, what: str, names: Sequence[str], picture_size: tuple[int, int] | None
) -> Box:
    if not isinstance(entry, dict) or set(entry) != KEYS:
        raise ValueError(f'{what} must have "label" and "box", and nothing else')
    category = class_index(entry["label"], names)
    if category < 0:
        raise ValueError(f"{what} has no class: give it a label, or leave the box out")
    x, y, width, height = _numbers(entry["box"], what)
    if width <= 0 or height <= 0:
        raise ValueError(f"{what} has no area: its width is {width:g}, its height {height:g}")
    whole = picture_size or (1.0, 1.0)
    edges = [
        edge / side for edge, side in zip((x, y, x + width, y + height), whole * 2, strict=True)
    ]
    if min(edges) < -ROUNDING or max(edges) > 1.0 + ROUNDING:
        unit = "pixels" if picture_size else "shares (for pixels, give the picture's size)"
        raise ValueError(
            f"{what}, [{x:g}, {y:g}, {width:g}, {height:g}], does not lie within a picture of "
            f"{whole[0]:g} x {whole[1]:g} {unit}"
        )
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in edges)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"{what} lies outside the picture")
    return Box(category, x0, y0, x1, y1)


def _numbers(numbers: object, what: str) -> tuple[float, ...]:
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) != 4
        or any(isinstance(number, bool) for number in numbers)
        or not all(isinstance(number, int | float) for number in numbers)
        or not all(math.isfinite(number) for number in numbers)
    ):
        raise ValueError(f"{what} is {str(numbers)[:60]}, not four numbers x, y, width, height")
    return tuple(float(number) for number in numbers)


def _drawn(picture: Tensor, boxes: Sequence[Box], names: Sequence[str]) -> Tensor:
    image = Image.fromarray(picture.movedim(0, -1).contiguous().numpy())
    draw = ImageDraw.Draw(image)
    right, bottom = image.width - 1, image.height - 1
    font = ImageFont.load_default(size=max(8, image.height // 20))
    for box in boxes:
        colour = COLOURS[box.category % len(COLOURS)]
        corners = (box.x0 * right, box.y0 * bottom, box.x1 * right, box.y1 * bottom)
        draw.rectangle(corners, outline=colour, width=max(1, image.height // 128))
        name = names[box.category] if box.category < len(names) else str(box.category)
        draw.text((corners[0] + 2, corners[1] + 1), name, fill=colour, font=font)
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous()
