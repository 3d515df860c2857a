"""Boxes in pixels, as annotation files have them, to shares of the picture."""

import math
from collections.abc import Iterable

from ldmkit.data.items import Box, Problem, Span
from ldmkit.data.pictures import open_picture

ORIENTATION = 274
"""The EXIF tag; from 5 on, width and height change places."""
ROUNDING = 0.01
"""How far a box may stick out by the rounding of its numbers, pixels."""


def box_in_shares(
    bbox: object, category: int, size: tuple[float, float], where: str, problems: list[Problem]
) -> Box | None:
    """A box as shares of its picture, cut at the picture's edges; None where nothing of it is left.

    Args:
        bbox: `[x, y, width, height]` in pixels, x and y of the upper left corner.
        category: index into the box names.
        size: width and height of the picture, pixels.
        where: how to call the box.
        problems: what is wrong with it is added here.
    """

    def left_out(kind: str, text: str, *, error: bool = False) -> None:
        severity = "error" if error else "warning"
        problems.append(Problem(kind, where, f"{where}: {text}", severity))

    numbers = _numbers(bbox)
    if numbers is None:
        left_out("bad box", f"{str(bbox)[:60]} is no box [x, y, width, height]", error=True)
        return None
    x, y, w, h = numbers
    if not (all(map(math.isfinite, numbers)) and w > 0 and h > 0):
        left_out("degenerate box", f"the box {_shown(numbers)} has no area and is left out")
        return None
    width, height = size
    edges = (x / width, y / height, (x + w) / width, (y + h) / height)
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in edges)
    picture = f"the picture of {width:g} x {height:g} pixels"
    if x0 >= x1 or y0 >= y1:
        text = f"the box {_shown(numbers)} lies outside {picture} and is left out"
        left_out("box outside the picture", text)
        return None
    if min(x, y) < -ROUNDING or x + w > width + ROUNDING or y + h > height + ROUNDING:
        text = f"the box {_shown(numbers)} sticks out of {picture} and is clipped to it"
        left_out("box clipped", text)
    return Box(category, x0, y0, x1, y1)


def pixel_size(picture: Span) -> tuple[float, float]:
    """Width and height of a picture as it is shown, its EXIF rotation applied.

    Raises:
        DataError: Pillow cannot tell.
    """
    with open_picture(picture.read(), picture.name) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        width, height = float(image.width), float(image.height)
        return (height, width) if turned else (width, height)


def _numbers(bbox: object) -> tuple[float, ...] | None:
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in bbox):
        return None
    try:
        return tuple(float(value) for value in bbox)
    except OverflowError:
        return None


def _shown(numbers: Iterable[float]) -> str:
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"
