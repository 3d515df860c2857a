"""Pictures of several small ones on a canvas, with boxes, label maps, numbers and captions.

python examples/compose.py DATA OUT --count 2000 --seed 0 --canvas any

DATA: pictures of one object each on white, with classes and captions, such as examples/data. Writes
OUT/images/NUMBER.png and metadata.jsonl (captions; `lightness`, the mean luma of the canvas, 0 to 1;
`count`, how many objects), OUT/labelmaps/NUMBER.png (0 canvas, then a number for each class) and
OUT/instances.json (COCO boxes). The same DATA, count, seed and canvas give the same files.

On canvases of any colour a box says little about what colour a pixel has, so a model that is told boxes
learns slowly; on white ones it does not.
"""

import argparse
import colorsys
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.items import Item
from ldmkit.data.pictures import decode_array
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig

SIDE, MARGIN = 64, 2
"""Of the pictures, and how far objects stay from their edges, pixels."""
SMALLEST, LARGEST = 20, 36
"""Longer side of an object, pixels."""
MOST = 3
"""Objects of a picture."""
OVERLAP = 0.1
"""Of two boxes, at most, as a share of the smaller one."""
TRIES = 40
WHITE = 244
"""What is as bright as this in every channel, and reaches the edge, is no object."""
LUMA = (0.299, 0.587, 0.114)

Corners = tuple[int, int, int, int]
"""x0, y0, x1, y1, pixels; the last ones outside."""


class Sprite(NamedTuple):
    """One object without its white ground."""

    image: Image.Image
    """Colours times alpha, and alpha; as large as the object."""
    label: int
    name: str


class Placed(NamedTuple):
    """An object in a picture."""

    sprite: Sprite
    corners: Corners


def main() -> None:
    """Compose the pictures and print where they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="pictures to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--canvas", choices=CANVASES, default="any")
    asked = parser.parse_args()
    compose(asked.data, asked.out, asked.count, asked.seed, asked.canvas)
    print(asked.out)


def compose(data: Path, out: Path, count: int, seed: int, canvas_kind: str = "any") -> None:
    """Write the pictures and all that is known of them."""
    source = open_source(SourceConfig(data=str(data)))
    cut = lru_cache(maxsize=None)(lambda number: cut_out(source.items[number]))
    for folder in ("images", "labelmaps"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    lines, images, annotations = [], [], []
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        name, (canvas, kind) = f"{number:06d}.png", CANVASES[canvas_kind](draw)
        placed = place(draw, cut, len(source.items))
        picture, labelmap = lay(canvas, placed)
        Image.fromarray(picture).save(out / "images" / name)
        Image.fromarray(labelmap).save(out / "labelmaps" / name)
        lightness = float((canvas @ np.array(LUMA)).mean() / 255)
        told = {"lightness": round(lightness, 4), "count": len(placed)}
        text = caption(placed, lightness, kind)
        lines.append(json.dumps({"file_name": name, "text": text, **told}))
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        annotations += [
            {"image_id": number, "category_id": one.sprite.label + 1, "bbox": as_coco(one.corners)}
            for one in placed
        ]
    numbered = [{"id": place, **one} for place, one in enumerate(annotations, start=1)]
    categories = [{"id": n, "name": name} for n, name in enumerate(source.class_names, start=1)]
    whole = {"images": images, "annotations": numbered, "categories": categories}
    (out / "instances.json").write_text(json.dumps(whole))
    (out / "images" / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))


def cut_out(item: Item) -> Sprite | None:
    """The object of a picture on white; None where it is nearly white, or fills the picture.

    What is partly white is unmixed: a colour is alpha times its own and 1 - alpha times white.
    """
    config = PreprocessingConfig(size=SIDE)
    picture = decode_array(item.picture.read(), item.name, config)
    alpha = opacity(picture)[..., None]
    if not 0.2 <= alpha.mean() <= 0.95:
        return None
    own = np.clip(picture - (1.0 - alpha) * 255.0, 0.0, 255.0 * alpha)
    image = Image.fromarray(np.rint(np.concatenate([own, alpha * 255.0], 2)).astype(np.uint8))
    name = item.caption.partition(" of ")[2] or item.caption
    return Sprite(image.crop(image.getchannel("A").getbbox()), item.label, name)


def opacity(picture: UInt8[np.ndarray, "y x 3"]) -> Float[np.ndarray, "y x"]:
    """0 on the white that reaches the edge, 1 within the object, between them where both are mixed."""
    darkest = picture.min(axis=2)
    bright = darkest >= WHITE
    edge = np.zeros_like(bright)
    edge[[0, -1], :] = edge[:, [0, -1]] = True
    ground = bright & edge
    while True:
        grown = bright & widened(ground)
        if (grown == ground).all():
            break
        ground = grown
    rim = widened(ground) & ~ground
    depth = 255.0 - darkest.astype(np.float32)
    inner = np.where(ground, 0.0, depth)
    reach = np.maximum.reduce([inner, *shifted(inner, 0.0)])  # the colour next to it, unmixed
    mixed = np.clip(depth / np.maximum(reach, 1.0), 0.0, 1.0)
    return np.where(ground, 0.0, np.where(rim, mixed, 1.0))


def widened(mask: Bool[np.ndarray, "y x"]) -> Bool[np.ndarray, "y x"]:
    """A mask and its neighbours."""
    return np.logical_or.reduce([mask, *shifted(mask, False)])


def shifted(map_: np.ndarray, outside: float) -> list[np.ndarray]:
    """A map moved by one pixel in the four directions."""
    padded = np.pad(map_, 1, constant_values=outside)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def paint_canvas(draw: np.random.Generator) -> tuple[UInt8[np.ndarray, "y x 3"], str]:
    """One colour, or a linear change from one to another, and which of these."""
    lightness = draw.uniform(0.1, 0.95)
    first = colour_of(draw, lightness)
    if draw.random() < 0.5:
        plain = np.broadcast_to(first, (SIDE, SIDE, 3))
        return np.rint(plain).astype(np.uint8), "plain"
    second = colour_of(draw, float(np.clip(lightness + draw.uniform(-0.25, 0.25), 0.05, 1.0)))
    angle = draw.uniform(0.0, 2 * np.pi)
    steps = np.linspace(-1.0, 1.0, SIDE)
    along = steps[None, :] * np.cos(angle) + steps[:, None] * np.sin(angle)
    share = ((along - along.min()) / (along.max() - along.min()))[..., None]
    return np.rint(first + share * (second - first)).astype(np.uint8), "shaded"


def leave_white(draw: np.random.Generator) -> tuple[UInt8[np.ndarray, "y x 3"], str]:
    """White, whatever is drawn."""
    del draw
    return np.full((SIDE, SIDE, 3), 255, np.uint8), "white"


def colour_of(draw: np.random.Generator, luma: float) -> Float[np.ndarray, " 3"]:
    """A random colour of a given luma (0 to 1), as 0 to 255."""
    colour = np.array(colorsys.hsv_to_rgb(draw.random(), draw.uniform(0.0, 0.8), 1.0))
    own = float(colour @ np.array(LUMA))
    if own > luma:
        return 255.0 * colour * (luma / own)
    return 255.0 * (colour + (1.0 - colour) * ((luma - own) / max(1.0 - own, 1e-6)))


def place(
    draw: np.random.Generator, cut: Callable[[int], Sprite | None], count: int
) -> list[Placed]:
    """One to three objects that hardly overlap."""
    placed: list[Placed] = []
    for _ in range(int(draw.integers(1, MOST + 1))):
        sprite = None
        while sprite is None:
            sprite = cut(int(draw.integers(count)))
        longer = int(draw.integers(SMALLEST, LARGEST + 1))
        scale = longer / max(sprite.image.size)
        width, height = (max(8, round(side * scale)) for side in sprite.image.size)
        small = sprite._replace(image=sprite.image.resize((width, height), Image.Resampling.BOX))
        for _ in range(TRIES):
            x = int(draw.integers(MARGIN, SIDE - MARGIN - width + 1))
            y = int(draw.integers(MARGIN, SIDE - MARGIN - height + 1))
            corners = (x, y, x + width, y + height)
            if all(overlap(corners, other.corners) <= OVERLAP for other in placed):
                placed.append(Placed(small, corners))
                break
    return placed


def overlap(one: Corners, other: Corners) -> float:
    """Common area as a share of the smaller box."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(width, 0) * max(height, 0) / smaller


def lay(
    canvas: UInt8[np.ndarray, "y x 3"], placed: list[Placed]
) -> tuple[UInt8[np.ndarray, "y x 3"], UInt8[np.ndarray, "y x"]]:
    """The picture, and the class of each pixel; later objects lie on top."""
    picture, labelmap = canvas.astype(np.float64), np.zeros((SIDE, SIDE), np.uint8)
    for sprite, (x0, y0, x1, y1) in placed:
        layer = np.asarray(sprite.image).astype(np.float64)
        alpha = layer[..., 3:] / 255.0
        where = (slice(y0, y1), slice(x0, x1))
        picture[where] = layer[..., :3] + (1.0 - alpha) * picture[where]
        labelmap[where][alpha[..., 0] >= 0.5] = sprite.label + 1
    return np.rint(picture.clip(0, 255)).astype(np.uint8), labelmap


def caption(placed: list[Placed], lightness: float, kind: str) -> str:
    """What the picture shows."""
    shade = "dark" if lightness < 0.35 else "light" if lightness > 0.65 else "medium"
    return f"{' and '.join(one.sprite.name for one in placed)} on a {shade} {kind} canvas"


def as_coco(corners: Corners) -> list[int]:
    """x, y, width, height."""
    x0, y0, x1, y1 = corners
    return [x0, y0, x1 - x0, y1 - y0]


CANVASES = {"any": paint_canvas, "white": leave_white}

if __name__ == "__main__":
    main()
