"""Does the search of `ldmkit evaluate` find copies, and nothing else? Planted ones in splits of a data set.

python bench/copies.py DATA --ae AE [--planted PATTERN] [--splits 6]

Groups of pictures (for the emoji in the box: of neighbouring code points, so that variants of one drawing stay together) are
held back at random, half of them. 50 training pictures go through the autoencoder and JPEG; they and the
held-back pictures whose key PATTERN matches (a file of keys, a line each; default: all but 267) are looked at as
samples, 267 other held-back pictures set the limit.
"""

import argparse
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmkit.assembly import autoencoder_facts, load_autoencoder, preprocessing_of
from ldmkit.data.images import read_images
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.metrics.frechet import rgb_pixels
from ldmkit.metrics.memorization import area_means, nearness, verdict
from ldmkit.pixels import Pixels

AT_ONCE, CALM, COPIES = 64, 267, 50
QUALITIES = (95, 90, 85, 75, 60)
NO_SIGN = {"200d", "fe0f", "2640", "2642", "27a1", "20e3", *(f"1f3f{c}" for c in "bcdef")}
"""Code points that vary a drawing: joiners, sexes, directions, skin tones."""


def main() -> None:
    """Measure each split and print a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--ae", type=Path, required=True)
    parser.add_argument("--planted", type=Path, help="file of keys")
    parser.add_argument("--splits", type=int, default=6)
    asked = parser.parse_args()
    items = open_source(SourceConfig(data=asked.data)).items
    keys = [item.key for item in items]
    own = set(asked.planted.read_text().split()) if asked.planted else None
    preprocessing = preprocessing_of(autoencoder_facts(asked.ae), None)
    autoencoder = load_autoencoder(asked.ae)
    files, decoded = [], []
    for first in range(0, len(items), AT_ONCE):
        images = read_images(items[first : first + AT_ONCE], preprocessing)
        files.append(rgb_pixels(images))
        with torch.no_grad():
            decoded.append(rgb_pixels(autoencoder.decode(autoencoder.encode(images).mean).float()))
    pictures = (torch.cat(files), torch.cat(decoded))
    for seed in range(asked.splits):
        print(one_split(seed, keys, pictures, own), flush=True)


def one_split(
    seed: int, keys: Sequence[str], pictures: tuple[Pixels, Pixels], own: set[str] | None
) -> str:
    """What is found in one split, in words."""
    groups = sorted({group_of(key) for key in keys})
    draw = random.Random(seed)  # noqa: S311
    draw.shuffle(groups)
    half = set(groups[: len(groups) // 2])
    held = [place for place, key in enumerate(keys) if group_of(key) in half]
    training = [place for place, key in enumerate(keys) if group_of(key) not in half]
    draw.shuffle(held)
    draw.shuffle(training)
    mine = {place for place, key in enumerate(keys) if own is None or key in own}
    spare = [place for place in held if own is None or place not in mine]
    calm = spare[: min(CALM, len(spare) // 2)]
    others = [place for place in held if place in mine and place not in set(calm)]
    planted = [place for place in training if place in mine][:COPIES]
    versions = [areas(part[training]) for part in pictures]
    usual = nearness(areas(pictures[1][calm]), versions)
    line = f"split {seed}: training {len(training)}"
    for name, part in zip(("as files", "decoded"), pictures, strict=True):
        found = verdict(nearness(areas(part[others]), versions), usual, 0.0)
        line += f"; {int(found.copies.sum())} of {len(others)} others flagged {name}"
    for quality in QUALITIES:
        copies = nearness(areas(compressed(pictures[1][planted], quality)), versions)
        found = verdict(copies, usual, 0.0)
        line += f"; JPEG {quality}: {int(found.copies.sum())} of {len(planted)}"
    return line


def group_of(key: str) -> int:
    """16 neighbouring code points of the last sign in an emoji's key; all clocks together."""
    signs = [code for code in key.split(".")[0].split("_")[-1].split("-") if code not in NO_SIGN]
    place = int(signs[-1], 16) >> 4 if signs else -1
    return 0x1F55 if place == 0x1F56 else place


def areas(pixels: Pixels) -> Tensor:
    """Area means of 8-bit pictures."""
    return area_means(pixels.float() / 127.5 - 1.0)


def compressed(pixels: Pixels, quality: int) -> Pixels:
    """Pictures after JPEG."""
    again = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        again.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    return torch.stack(again)


if __name__ == "__main__":
    main()
