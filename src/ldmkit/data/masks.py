"""Holes for inpainting: random ones to train with, and those that a user draws.

True is a hole, everywhere. Random holes are wide strokes and boxes as LaMa's (Suvorov et al. 2022,
"Resolution-robust large mask inpainting with Fourier convolutions", App. C; lengths there are for
256 pixels and are shares of the shorter side here), and halves and margins to be painted on. They
cover 1 to 60 percent of the picture. A hole is a function of the generator alone.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageOps

from ldmkit.data.arrays import NPY_MAGIC, decode_npy
from ldmkit.data.gaps import MASK_MODES
from ldmkit.data.items import Blob
from ldmkit.data.opening import open_picture
from ldmkit.errors import DataError

Hole = Bool[np.ndarray, "_height _width"]
Size = tuple[int, int]

LEAST, MOST = 0.01, 0.6
"""Share of the picture that a random hole covers."""
SMALLEST_SIDE = 8
STROKE_WIDTH, STROKE_LENGTH = (5 / 256, 105 / 256), (10 / 256, 210 / 256)
BOX_SIDE, BOX_MARGIN = (30 / 256, 150 / 256), 10 / 256
LARGEST_ANGLE = 4.0
"""Radians; the strokes of one hole turn to both sides by turns."""


def random_hole(
    draw: np.random.Generator,
    height: int,
    width: int,
    mixture: Mapping[str, float] | None = None,
) -> Hole:
    """A random hole `[height, width]`, of a kind that is drawn first.

    Args:
        draw: decides everything.
        height: of the picture, pixels.
        width: of the picture, pixels.
        mixture: probability of each kind in `HOLES`; must sum to 1 (default: `MIXTURE`).

    Raises:
        ValueError: a side is shorter than 8 pixels, or the mixture names no kind or is no mixture.
    """
    mixture = MIXTURE if mixture is None else mixture
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"a picture of {width} x {height} pixels is too small for random holes: "
            f"sides of {SMALLEST_SIDE} pixels or more are needed"
        )
    unknown = sorted(set(mixture) - set(HOLES))
    if unknown:
        raise ValueError(f"there are no holes called {unknown[0]}: take {', '.join(HOLES)}")
    if min(mixture.values(), default=0.0) < 0 or abs(sum(mixture.values()) - 1.0) > 1e-6:
        raise ValueError(f"the probabilities {dict(mixture)} are not from 0 to 1 with the sum 1")
    kind = draw.choice(list(mixture), p=list(mixture.values()))
    return HOLES[kind](draw, (height, width))


def strokes(draw: np.random.Generator, size: Size) -> Hole:
    """One to five broken lines of random width and direction."""
    count = int(draw.integers(1, 6))
    return _gathered(lambda number: _stroke(draw, size, number), size, count)


def boxes(draw: np.random.Generator, size: Size) -> Hole:
    """One to four rectangles that do not touch the edge."""
    count = int(draw.integers(1, 5))
    return _gathered(lambda number: _box(draw, size), size, count)


def half(draw: np.random.Generator, size: Size) -> Hole:
    """The left, right, upper or lower half."""
    side = int(draw.integers(4))
    return _side_of(size, side, size[side // 2] // 2)


def margin(draw: np.random.Generator, size: Size) -> Hole:
    """What outpainting adds: a strip at one side, or all around a window; 10 to 60 percent."""
    share = draw.uniform(0.1, MOST)
    side = int(draw.integers(5))
    if side < 4:
        return _side_of(size, side, int(share * size[side // 2]))
    height, width = (min(n - 1, math.ceil(n * math.sqrt(1.0 - share))) for n in size)
    top = int(draw.integers(size[0] - height + 1))
    left = int(draw.integers(size[1] - width + 1))
    hole = np.ones(size, dtype=bool)
    hole[top : top + height, left : left + width] = False
    return hole


def read_hole(blob: Blob, size: Size) -> Hole:
    """A user's mask from a file: what is brighter than half is the hole.

    Args:
        blob: a grey or RGB picture, or a `.npy`.
        size: height and width of the picture it belongs to, pixels.

    Raises:
        DataError: it is none, or has another size than its picture.
    """
    name = f"the hole mask {blob.name}"
    data = blob.read()
    if data.startswith(NPY_MAGIC):
        raw = decode_npy(data, name, 1)
    else:
        with open_picture(data, name) as image:
            if image.mode not in MASK_MODES:
                raise DataError(f"{name} has pixels of mode {image.mode}; a mask is grey or RGB")
            image = ImageOps.exif_transpose(image)
            raw = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    try:
        return parse_mask(raw, size)
    except ValueError as error:
        raise DataError(f"{name} cannot be used: {error}") from error


def parse_mask(raw: np.ndarray, size: Size) -> Hole:
    """A user's mask: what is brighter than half is the hole.

    Args:
        raw: `[h, w]` or `[h, w, 1 or 3]` (mean of the colours), bool, uint8, uint16, or floating
            point from 0 to 1.
        size: height and width of its picture, pixels.

    Raises:
        ValueError: it has another size or shape, or other numbers.
    """
    if raw.ndim not in (2, 3) or (raw.ndim == 3 and raw.shape[2] not in (1, 3)):
        raise ValueError(
            f"a mask is grey or RGB, and this one has the shape {list(raw.shape)}: give [h, w] or "
            "[h, w, 3]"
        )
    if raw.shape[:2] != tuple(size):
        raise ValueError(
            f"the mask has {raw.shape[1]} x {raw.shape[0]} pixels and its picture "
            f"{size[1]} x {size[0]}: give one of the same size"
        )
    if raw.dtype.kind == "f":
        if not bool(((raw >= 0.0) & (raw <= 1.0)).all()):
            raise ValueError("the mask has numbers outside of 0 to 1: give 1 for the hole, else 0")
        most = 1.0
    elif raw.dtype in (np.bool_, np.uint8, np.uint16):
        most = 1.0 if raw.dtype == np.bool_ else float(np.iinfo(raw.dtype).max)
    else:
        raise ValueError(f"the mask has {raw.dtype} numbers: give bool, uint8, uint16 or float")
    values = raw.astype(np.float64)
    return (values.mean(axis=2) if raw.ndim == 3 else values) > most / 2


def _gathered(shape: Callable[[int], Hole], size: Size, count: int) -> Hole:
    """So many shapes together, and more while they cover too little; none that covers too much."""
    hole, number = np.zeros(size, dtype=bool), 0
    while number < count or hole.mean() < LEAST:
        grown = hole | shape(number)
        hole = grown if grown.mean() <= MOST else hole
        number += 1
    return hole


def _stroke(draw: np.random.Generator, size: Size, number: int) -> Hole:
    image = Image.new("1", (size[1], size[0]))
    canvas = ImageDraw.Draw(image)
    side = min(size)
    x, y = draw.uniform(0, size[1]), draw.uniform(0, size[0])
    for _ in range(int(draw.integers(1, 6))):
        angle = draw.uniform(0.0, LARGEST_ANGLE) * (-1 if number % 2 == 0 else 1)
        length, thickness = side * draw.uniform(*STROKE_LENGTH), side * draw.uniform(*STROKE_WIDTH)
        former = (x, y)
        x = min(max(x + length * math.sin(angle), 0.0), size[1] - 1.0)
        y = min(max(y + length * math.cos(angle), 0.0), size[0] - 1.0)
        canvas.line([former, (x, y)], fill=1, width=max(1, round(thickness)))
        radius = thickness / 2
        for end_x, end_y in (former, (x, y)):
            ends = (end_x - radius, end_y - radius, end_x + radius, end_y + radius)
            canvas.ellipse(ends, fill=1)
    return np.array(image)


def _box(draw: np.random.Generator, size: Size) -> Hole:
    shorter = min(size)
    edge = int(BOX_MARGIN * shorter)
    height, width = (max(1, round(shorter * draw.uniform(*BOX_SIDE))) for _ in range(2))
    top = int(draw.integers(edge, size[0] - edge - height + 1))
    left = int(draw.integers(edge, size[1] - edge - width + 1))
    hole = np.zeros(size, dtype=bool)
    hole[top : top + height, left : left + width] = True
    return hole


def _side_of(size: Size, side: int, depth: int) -> Hole:
    """The first pixels from above (0), below (1), the left (2) or the right (3); one at least."""
    hole = np.zeros(size, dtype=bool)
    lines = hole if side < 2 else hole.T
    depth = max(1, depth)
    lines[slice(None, depth) if side % 2 == 0 else slice(-depth, None)] = True
    return hole


HOLES: dict[str, Callable[[np.random.Generator, Size], Hole]] = {
    "strokes": strokes,
    "boxes": boxes,
    "half": half,
    "margin": margin,
}
"""Kinds of random holes: (draw, (height, width)) -> hole."""

MIXTURE: Mapping[str, float] = {"strokes": 0.5, "boxes": 0.3, "half": 0.1, "margin": 0.1}
"""Probability of each kind where nothing else is asked for."""
