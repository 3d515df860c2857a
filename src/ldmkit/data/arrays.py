"""Files of numbers rather than colours: NumPy arrays, and the TIFF files that Pillow cannot hold.

Both become a NumPy array `[h, w]` or `[h, w, c]` in the number format of the file. Sizes are checked
from the header before memory is taken; nothing is unpickled.
"""

import io
import math
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldmkit.errors import DataError

MAX_PIXELS = 100_000_000
NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, SAMPLES, SAMPLE_FORMAT = 258, 277, 339
"""Tags of a TIFF file (TIFF 6.0, sections 4 and 19)."""
GREY_BY_PILLOW = ((1, 12), (1, 16), (2, 16), (2, 32), (3, 32))
"""(format, bits) of single samples that Pillow keeps: 1 = unsigned, 2 = signed, 3 = floating point."""


def decode_npy(data: bytes, name: str, channels: int) -> np.ndarray:
    """The array of a `.npy` file, its channels last.

    Args:
        data: the file's bytes.
        name: how to call it in errors.
        channels: tells `[h, w, c]` from `[c, h, w]`.

    Raises:
        DataError: it is damaged or too large, or its axes cannot be told apart.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
    except (ValueError, SyntaxError, TypeError, OSError) as error:
        raise DataError(f"{name} is a damaged NumPy file ({error})") from error
    if dtype.hasobject:
        raise DataError(f"{name} holds Python objects, which are not read; save numbers")
    axis = _channel_axis(shape, channels, name)
    require_size([side for place, side in enumerate(shape) if place != axis], name)
    if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
        raise DataError(f"{name} is a damaged NumPy file (cut off)")
    file.seek(0)
    array = np.load(file, allow_pickle=False)
    return array if axis is None else np.moveaxis(array, axis, 2)


def pillow_keeps(data: bytes, channels: int) -> bool:
    """Whether Pillow reads this TIFF without cutting bits or channels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                tags = getattr(image, "tag_v2", {})
                bits, samples = tags.get(BITS, (1,)), tags.get(SAMPLES, 1)
                formats = tags.get(SAMPLE_FORMAT, (1,))
    except Image.DecompressionBombError:
        return True  # to be refused by its size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return False
    if max(bits) <= 8 and set(formats) == {1}:
        return channels in (1, 3)
    return samples == 1 and channels == 1 and (formats[0], bits[0]) in GREY_BY_PILLOW


def decode_tiff(data: bytes, name: str, channels: int) -> np.ndarray:
    """The first page of a TIFF file, or its pages where there is one of each channel.

    Args:
        data: the file's bytes.
        name: how to call it in errors.
        channels: of the model; more than one make as many grey pages into one picture.

    Raises:
        DataError: it is damaged, too large, compressed in an unknown way, or tifffile is missing.
    """
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{name} is a TIFF file that Pillow cannot read without loss; tifffile can: "
            "pip install 'ldmkit[scientific]'"
        ) from error
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            first = file.pages.first
            if not set("YX") <= set(first.axes) <= set("YXS"):
                raise DataError(f"{name} has the axes {first.axes}, which are not read")
            require_size([first.shape[first.axes.index(axis)] for axis in "YX"], name)
            if len(first.shape) == 2 and len(file.pages) == channels:
                pages = [page.asarray(maxworkers=1) for page in file.pages]
                return np.stack(pages, axis=2) if channels > 1 else pages[0]
            array = first.asarray(maxworkers=1)
            return np.moveaxis(array, first.axes.index("S"), 2) if "S" in first.axes else array
    except (tifffile.TiffFileError, OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{name} cannot be read as TIFF ({error})") from error
    except (zlib.error, struct.error) as error:
        raise DataError(f"{name} is a damaged TIFF file ({error})") from error


def require_size(sides: list[int], name: str) -> None:
    """Check height and width.

    Raises:
        DataError: the picture is empty or has more than `MAX_PIXELS` pixels.
    """
    if math.prod(sides) > MAX_PIXELS:
        raise DataError(
            f"{name} has {' x '.join(map(str, sides))} pixels; at most {MAX_PIXELS:,} are read"
        )
    if math.prod(sides) == 0:
        raise DataError(f"{name} has no pixels ({' x '.join(map(str, sides))})")


def _channel_axis(shape: tuple[int, ...], channels: int, name: str) -> int | None:
    """0 or 2; None where there is no such axis."""
    if len(shape) == 2:
        return None
    outer = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] == channels]
    if len(outer) == 1:
        return outer[0]
    found = "both outer axes are" if outer else "none of [h, w], [h, w, c] and [c, h, w] has"
    raise DataError(
        f"{name} has the shape {list(shape)}, where {found} the model's {channels} channels "
        "(--preprocessing.channels)"
    )
