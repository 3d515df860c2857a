"""Pictures as parts of a page: scaled down until they fit, so that the page stays small enough to send."""

import base64
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldmkit.pages.markup import text_of

ALL_BYTES = 5_500_000
"""Of all pictures of a page together; base64 makes a third more of them."""
ONE_BYTES = 1_000_000
MOST_PIXELS = 64_000_000
"""Larger files are not opened."""
LONGEST = 1_200
"""Longer side of a shown picture, pixels."""
NEWEST = 3
SMALL = 300
"""Width below which a picture is shown larger than it is, pixels."""


def chosen(pictures: Sequence[Path]) -> list[Path]:
    """Of previews named NAME-STEP.png the first, the middle and the newest few of each name, by step."""
    by_name: dict[str, list[tuple[int, Path]]] = {}
    for picture in pictures:
        name, step = name_and_step(picture)
        by_name.setdefault(name, []).append((step, picture))
    kept = []
    for group in by_name.values():
        group.sort()
        places = {0, len(group) // 2, *range(max(0, len(group) - NEWEST), len(group))}
        kept += [group[place][1] for place in sorted(places)]
    return kept


def name_and_step(picture: Path) -> tuple[str, int]:
    """`samples-000000650.png` as its two parts; the step is -1 if the name has none."""
    found = re.fullmatch(r"(.+)-([0-9]{1,18})", picture.stem)
    return (found[1], int(found[2])) if found else (picture.stem, -1)


def as_image(picture: Path, most_bytes: int) -> str:
    """An `img` element with the picture's pixels in it, or words where it cannot be shown.

    Args:
        picture: a PNG file.
        most_bytes: of its pixels as PNG; it is made smaller until it needs no more.
    """
    try:
        data, width = _png(picture, min(most_bytes, ONE_BYTES))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        reason = str(error) or type(error).__name__
        return f"<p>{text_of(picture.name)} cannot be shown: {text_of(reason)}</p>"
    shown = width * max(1, SMALL // width + (SMALL % width > 0)) if width < SMALL else width
    code = base64.b64encode(data).decode("ascii")
    return f'<img alt="{text_of(picture.name)}" width="{shown}" src="data:image/png;base64,{code}">'


def share(pictures: int) -> int:
    """Bytes that each of so many pictures may have."""
    return ALL_BYTES // max(1, pictures)


def _png(picture: Path, most_bytes: int) -> tuple[bytes, int]:
    """The bytes of a PNG of at most so many bytes, and its width in pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(picture, formats=["PNG"]) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    longest = LONGEST
    while True:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= most_bytes or max(image.size) <= 16:
            return buffer.getvalue(), image.width
        longest = max(image.size) * 3 // 4
