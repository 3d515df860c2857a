"""One picture of a whole run: real pictures, their reconstructions, and generated ones by class.

python examples/contact_sheet.py DATA AUTOENCODER SAMPLES OUT.png
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import ldmkit
from ldmkit.assembly import autoencoder_facts
from ldmkit.data.images import read_images, split
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.pixels import to_pixels

COLUMNS, ENLARGE, MARGIN = 8, 2, 150


def main(data: Path, autoencoder: Path, samples: Path, out: Path) -> None:
    """Compose the sheet and print its path."""
    facts = autoencoder_facts(autoencoder)
    held_back = split(
        open_source(SourceConfig(data=str(data))).items, facts.trained["holdout"]
    ).held_back
    images = read_images(held_back[:COLUMNS], facts.preprocessing)
    model = ldmkit.load_autoencoder(autoencoder)
    with torch.inference_mode():
        reconstructions = model.decode(model.encode(images).mean)

    rows = {"real, held back": pictures(images), "reconstructed": pictures(reconstructions)}
    generated: dict[str, list[Image.Image]] = defaultdict(list)
    for file in sorted(samples.glob("[0-9]*.png")):
        _, _, label = file.stem.partition("-")
        generated[f"new: {label}"].append(Image.open(file).convert("RGB"))
    compose(rows | generated).save(out)
    print(out)


def pictures(images: torch.Tensor) -> list[Image.Image]:
    """Images in [-1, 1] as RGB pictures."""
    return [Image.fromarray(np.asarray(p.movedim(0, 2))).convert("RGB") for p in to_pixels(images)]


def compose(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows of pictures with their names at the left."""
    side = next(iter(rows.values()))[0].width * ENLARGE
    sheet = Image.new("RGB", (MARGIN + COLUMNS * (side + 4), len(rows) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, row_pictures) in enumerate(rows.items()):
        top = row * (side + 4)
        draw.text((4, top + side // 2 - 8), name, fill="black", font=ImageFont.load_default(15))
        for column, picture in enumerate(row_pictures[:COLUMNS]):
            sheet.paste(picture.resize((side, side)), (MARGIN + column * (side + 4), top))
    return sheet


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
