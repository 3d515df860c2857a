"""How long `ldmkit check` takes: `python bench/check.py [DIR]` writes made pictures there and reads them.

10,000 smooth pictures with grain and shapes, sides of 64 to 256 pixels, half PNG and half JPEG.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import ldmkit
from ldmkit import CheckConfig

COUNT, WORKERS = 10_000, 2


def main() -> None:
    """Write the pictures unless they are there, check them, and print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder in which the pictures stay")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as scratch:
        root = (keep or Path(scratch)) / "pictures"
        if not root.exists():
            write_pictures(root)
        start = time.perf_counter()
        report = ldmkit.check(CheckConfig(data=str(root), size=64, workers=WORKERS))
        seconds = time.perf_counter() - start
    use = resource.getrusage(resource.RUSAGE_CHILDREN)
    own, others = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    found = {finding["kind"]: finding["count"] for finding in report["findings"]}
    print(f"{report['pictures']} pictures in {seconds:.1f} s with {WORKERS} reading processes")
    print(f"processor time of the reading processes: {use.ru_utime + use.ru_stime:.1f} s")
    print(f"peak memory: {own:.0f} MiB, and {others:.0f} MiB in the largest reading process")
    print(f"found: {found}")


def write_pictures(root: Path) -> None:
    """Write COUNT pictures that all differ."""
    root.mkdir(parents=True)
    for number in range(COUNT):
        picture = draw_picture(number)
        if number % 2:
            picture.save(root / f"{number:05d}.jpg", quality=90)
        else:
            picture.save(root / f"{number:05d}.png")


def draw_picture(number: int) -> Image.Image:
    """A smooth ground, grain, and a shape."""
    draw = np.random.default_rng(number)
    width, height = (int(side) for side in draw.integers(64, 257, 2))
    coarse = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    ground = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = draw.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(ground) + grain, 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    corner = draw.integers(0, min(width, height) // 2, 2)
    box = [*corner.tolist(), *(corner + min(width, height) // 3).tolist()]
    colour = tuple(draw.integers(0, 256, 3).tolist())
    ImageDraw.Draw(picture).ellipse(box, fill=colour)
    return picture


if __name__ == "__main__":
    main()
