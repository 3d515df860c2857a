"""Open a picture file with Pillow: its header is read and checked, its pixels are not."""

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from ldmkit.data.arrays import require_size, too_large
from ldmkit.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
"""What Pillow may open: it would run a program for others (EPS)."""
DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow and tifffile raise on damaged files."""
LATE_EXIF = b"eXIf"


@contextlib.contextmanager
def open_picture(data: bytes, name: str) -> Iterator[Image.Image]:
    """A picture as Pillow opens it; its size is checked, its pixels are not yet read.

    Raises:
        DataError: it is no picture, too large, or damaged, also where that shows in the block only.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked here, from the header
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                require_size([image.width, image.height], name)
                yield image
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))  # of pixels; Pillow does not tell the sides
        raise too_large(name, f"{int(count[0]):,}" if count else "too many") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a picture") from error
    except DAMAGE as error:
        raise DataError(f"{name} is a damaged picture ({error})") from error


def opens(data: bytes) -> bool:
    """Whether Pillow knows the kind of this TIFF; one that is too large counts, to be refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(data), formats=("TIFF",)).close()
    except Image.DecompressionBombError:
        return True
    except DAMAGE:
        return False
    return True


def orientation_of(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or its block is damaged."""
    try:
        if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
            late = _late_exif(data, image)
            if late:
                exif = Image.Exif()
                exif.load(late)
                return _valid(exif.get(ExifTags.Base.Orientation, 1))
        if not _may_have_exif(image):
            return 1
        # not PngImageFile.getexif, which reads all pixels to find it
        return _valid(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return 1


def _valid(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _may_have_exif(image: Image.Image) -> bool:
    keys = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
    return hasattr(image, "tag_v2") or any(key in image.info for key in keys)


def _late_exif(data: bytes, image: Image.Image) -> bytes:
    """The EXIF block behind the pixels of a PNG file; the chunks are only counted through."""
    tile = image.tile[0] if image.tile else None  # pyright: ignore[reportAttributeAccessIssue]
    if tile is None:
        return b""
    place = tile.offset - 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == LATE_EXIF:
            return b"Exif\0\0" + data[place + 8 : place + 8 + length]
        place += 12 + length
    return b""


def frames_of(image: Image.Image) -> int:
    """Pages or frames; 2 where more follow, but what follows is damaged."""
    try:
        return getattr(image, "n_frames", 1)
    except DAMAGE:
        return 2
