"""What samples were told, the pictures that say the same, and what came out, above one another.

python examples/beside.py LATENTS AUTOENCODER OUT.png PICTURES... [--told KIND]

LATENTS: the set that `sample --like LATENTS --holdout 0.05` read; PICTURES: folders that `decode` wrote.
Without --told the samples were told nothing.
"""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

import ldmkit
from ldmkit.conditioning.box_lists import draw_boxes
from ldmkit.conditioning.layout import boxes_of_rows
from ldmkit.data.latent_set import LatentSet
from ldmkit.pixels import to_pixels

HOLDOUT, COLUMNS, SIDE, GAP, MARGIN = 0.05, 12, 128, 4, 90
COLOURS = ("black", "red", "blue", "lime", "orange", "magenta", "cyan", "yellow", "purple", "white")
"""Of label maps, by class."""


def main() -> None:
    """Compose the sheet and print its path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("latents", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--told", choices=TOLD)
    asked = parser.parse_args()
    latents = LatentSet(asked.latents)
    indices = np.setdiff1d(np.arange(len(latents)), latents.training_indices(HOLDOUT))
    indices = indices[np.arange(COLUMNS) % len(indices)]
    model = ldmkit.load_autoencoder(asked.autoencoder)
    with torch.inference_mode():
        decoded = model.decode(latents.read(indices).mean.float())
    real = [picture(pixels) for pixels in to_pixels(decoded)]
    rows = {"told": TOLD[asked.told](latents, indices, real)} if asked.told else {}
    rows["real, decoded"] = real
    for folder in asked.pictures:
        files = sorted(folder.glob("[0-9]*.png"))[:COLUMNS]
        rows[f"made: {folder.parent.name}"] = [Image.open(file).convert("RGB") for file in files]
    compose(rows).save(asked.out)
    print(asked.out)


def picture(pixels: torch.Tensor) -> Image.Image:
    """8-bit pixels `[3, y, x]` as a picture."""
    return Image.fromarray(pixels.movedim(0, 2).numpy())


def words(text: str) -> Image.Image:
    """A text as a picture."""
    tile = Image.new("RGB", (SIDE, SIDE), "white")
    font = ImageFont.load_default(13)
    ImageDraw.Draw(tile).text((4, 4), textwrap.fill(text, 17), fill="black", font=font)
    return tile


def classes(latents: LatentSet, indices: np.ndarray, real: list[Image.Image]) -> list[Image.Image]:
    """Names of the classes, of every label set."""
    sets = [one.classes for one in latents.manifest.label_sets] or [latents.manifest.class_names]
    return [
        words(" ".join(names[label] for names, label in zip(sets, row, strict=True) if label >= 0))
        for row in latents.labels_of_sets[indices].tolist()
    ]


def captions(latents: LatentSet, indices: np.ndarray, real: list[Image.Image]) -> list[Image.Image]:
    """Captions."""
    every = list(latents.texts("caption"))
    return [words(every[index]) for index in indices]


def boxes(latents: LatentSet, indices: np.ndarray, real: list[Image.Image]) -> list[Image.Image]:
    """Boxes and their classes, drawn on white."""
    names = latents.manifest.box_names
    blank = torch.full((1, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    every = [
        boxes_of_rows(torch.from_numpy(latents.boxes(index)), len(names))
        for index in indices.tolist()
    ]
    return [picture(draw_boxes(blank, [some], names)[0]) for some in every]


def labelmaps(
    latents: LatentSet, indices: np.ndarray, real: list[Image.Image]
) -> list[Image.Image]:
    """A colour for each class: the one that its label maps had, where they were in colours."""
    usual = [ImageColor.getrgb(name) for name in COLOURS]
    colours = np.array([usual[number % len(usual)] for number in range(256)], np.uint8)
    for one in reversed(latents.manifest.labelmap_colours):  # the first of a class counts
        colours[one.id] = one.colour
    return [Image.fromarray(colours[one]) for one in latents.rows("labelmap", indices).numpy()]


def small(latents: LatentSet, indices: np.ndarray, real: list[Image.Image]) -> list[Image.Image]:
    """The small pictures."""
    return [picture(one) for one in latents.rows("lowres", indices)]


def holes(latents: LatentSet, indices: np.ndarray, real: list[Image.Image]) -> list[Image.Image]:
    """Pictures with black holes."""
    masks = latents.rows("hole", indices).numpy() > 0
    whole = np.stack([np.asarray(one) for one in real])
    return [Image.fromarray(one) for one in np.where(masks[..., None], np.uint8(0), whole)]


def numbers(latents: LatentSet, indices: np.ndarray, real: list[Image.Image]) -> list[Image.Image]:
    """Names and values."""
    names = latents.manifest.scalar_names
    rows = latents.rows("scalars", indices).tolist()
    return [
        words(", ".join(f"{name} {value:.2f}" for name, value in zip(names, row, strict=True)))
        for row in rows
    ]


def compose(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows of pictures with their names at the left."""
    step = SIDE + GAP
    sheet = Image.new("RGB", (MARGIN + COLUMNS * step, len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows.items()):
        text = textwrap.fill(name, 11)
        draw.text((4, row * step + SIDE // 3), text, fill="black", font=ImageFont.load_default(13))
        for column, tile in enumerate(pictures):
            large = tile.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(large, (MARGIN + column * step, row * step))
    return sheet


TOLD: dict[str, Callable[[LatentSet, np.ndarray, list[Image.Image]], list[Image.Image]]] = {
    "class": classes,
    "text": captions,
    "layout": boxes,
    "labelmap": labelmaps,
    "lowres": small,
    "mask": holes,
    "scalars": numbers,
}
"""What is told, as pictures: (set, indices, the real pictures) -> one tile for each."""


if __name__ == "__main__":
    main()
