"""Files of numbers rather than colours: NumPy arrays, and the TIFF files that Pillow cannot hold.

Both become a NumPy array `[h, w]` or `[h, w, c]` in the number format of the file. Sizes are checked
from the header before memory is taken; nothing is unpickled.
"""

import contextlib
import io
import logging
import math
import struct
import zlib
from collections.abc import Iterator
from tokenize import TokenError
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ldmkit.errors import DataError

if TYPE_CHECKING:
    from tifffile import TiffFile

MAX_PIXELS = 100_000_000
NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_ORIENTATION = 274
TIFF_DAMAGE = (OSError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError)
NPY_DAMAGE = (*TIFF_DAMAGE, SyntaxError, TokenError)
KINDS = {"u": "uint", "i": "int", "f": "float"}


class Header(NamedTuple):
    """What the header of an array says."""

    mode: str
    """The axes of NumPy's ("hw", "hwc", "chw"); "" for TIFF."""
    width: int
    height: int
    bits: int
    """Of one number."""
    channels: int
    numbers: str
    """Kind of the numbers: "uint", "int", "float", or NumPy's name of another."""
    frames: int = 1
    orientation: int = 1
    """EXIF: 1 = upright, 2 to 8 = mirrored or turned."""


def look_at_npy(data: bytes, name: str) -> Header:
    """The header of a `.npy` file; channels are its shorter outer axis, the last where both are equal.

    Raises:
        DataError: it is damaged or too large, or has not 2 or 3 axes.
    """
    shape, dtype = _npy_header(data, name)
    mode = "hw" if len(shape) == 2 else "chw" if shape[0] < shape[2] else "hwc"
    sides = dict(zip(mode, shape, strict=True))
    require_size([sides["h"], sides["w"]], name)
    kind = KINDS.get(dtype.kind, dtype.name)
    bits = dtype.itemsize * 8
    return Header(mode, sides["w"], sides["h"], bits, sides.get("c", 1), kind)


def decode_npy(data: bytes, name: str, channels: int) -> np.ndarray:
    """The array of a `.npy` file, its channels last.

    Args:
        data: the file's bytes.
        name: how to call it in errors.
        channels: tells `[h, w, c]` from `[c, h, w]`.

    Raises:
        DataError: it is damaged or too large, or its axes cannot be told apart.
    """
    shape, _ = _npy_header(data, name)
    axis = _channel_axis(shape, channels, name)
    require_size([side for place, side in enumerate(shape) if place != axis], name)
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return array if axis is None else np.moveaxis(array, axis, 2)


def look_at_tiff(data: bytes, name: str) -> Header:
    """The header of a TIFF file as tifffile reads it.

    Raises:
        DataError: it is damaged or too large, or tifffile is missing.
    """
    with _opened_tiff(data, name) as file:
        first = file.pages.first
        height, width = (first.shape[first.axes.index(axis)] for axis in "YX")
        dtype = np.dtype(first.dtype)
        return Header(
            mode="",
            width=width,
            height=height,
            bits=first.bitspersample,
            channels=first.samplesperpixel,
            numbers=KINDS.get(dtype.kind, dtype.name),
            frames=len(file.pages),
            orientation=_orientation(file),
        )


def decode_tiff(data: bytes, name: str, channels: int, orientation: int) -> np.ndarray:
    """The first page of a TIFF file, upright, or its pages where there is one of each channel.

    Args:
        data: the file's bytes.
        name: how to call it in errors.
        channels: of the model; more than one make as many grey pages into one picture.
        orientation: by EXIF, 1 to 8.

    Raises:
        DataError: it is damaged, too large, compressed in an unknown way, or tifffile is missing.
    """
    with _opened_tiff(data, name) as file:
        first = file.pages.first
        if len(first.shape) == 2 and len(file.pages) == channels:
            pages = [page.asarray(maxworkers=1) for page in file.pages]
            array = np.stack(pages, axis=2) if channels > 1 else pages[0]
        else:
            array = first.asarray(maxworkers=1)
            if "S" in first.axes:
                array = np.moveaxis(array, first.axes.index("S"), 2)
        return upright(array, orientation)


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn `[h, w]` or `[h, w, c]` as an EXIF orientation says (Exif 3.0, 4.6.5.1)."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return array[:: -1 if down else 1, :: -1 if right else 1]


def require_size(sides: list[int], name: str) -> None:
    """Check height and width.

    Raises:
        DataError: the picture is empty or has more than `MAX_PIXELS` pixels.
    """
    if math.prod(sides) > MAX_PIXELS:
        raise too_large(name, " x ".join(map(str, sides)))
    if math.prod(sides) == 0:
        raise DataError(f"{name} has no pixels ({' x '.join(map(str, sides))})")


def too_large(name: str, count: str) -> DataError:
    """What to raise for a picture of more than `MAX_PIXELS`."""
    return DataError(f"{name} has {count} pixels; at most {MAX_PIXELS:,} are read")


def read_npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and number format; leaves the file where the numbers begin.

    Raises:
        ValueError: it is no NumPy file; a damaged one may raise others (`NPY_DAMAGE`).
    """
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(file)


def _npy_header(data: bytes, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and number format; that as many bytes follow is checked."""
    file = io.BytesIO(data)
    try:
        shape, _, dtype = read_npy_header(file)
    except NPY_DAMAGE as error:
        raise DataError(f"{name} is a damaged NumPy file ({error})") from error
    if dtype.hasobject:
        raise DataError(f"{name} holds Python objects, which are not read; save numbers")
    if len(shape) not in (2, 3):
        raise DataError(
            f"{name} has the shape {list(shape)}, which is none of [h, w], [h, w, c] and [c, h, w]"
        )
    if any(side < 0 for side in shape):
        raise DataError(f"{name} is a damaged NumPy file (shape {list(shape)})")
    if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
        require_size(list(shape) if len(shape) == 2 else sorted(shape)[-2:], name)
        raise DataError(f"{name} is a damaged NumPy file (cut off)")
    return shape, dtype


def _channel_axis(shape: tuple[int, ...], channels: int, name: str) -> int | None:
    """0 or 2; None where there is no such axis."""
    if len(shape) == 2:
        return None
    outer = [axis for axis in (0, 2) if shape[axis] == channels]
    if len(outer) == 1:
        return outer[0]
    found = "both outer axes are" if outer else "none of [h, w], [h, w, c] and [c, h, w] has"
    raise DataError(
        f"{name} has the shape {list(shape)}, where {found} the model's {channels} channels "
        "(--preprocessing.channels)"
    )


@contextlib.contextmanager
def _opened_tiff(data: bytes, name: str) -> Iterator["TiffFile"]:
    """A TIFF file whose axes and size are checked; what goes wrong in the block is its damage."""
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{name} is a TIFF file that Pillow cannot read without loss; tifffile can: "
            "pip install 'ldmkit[scientific]'"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters is raised here
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            first = file.pages.first
            if not set("YX") <= set(first.axes) <= set("YXS"):
                raise DataError(f"{name} has the axes {first.axes}, which are not read")
            if first.photometric == tifffile.PHOTOMETRIC.PALETTE:
                raise DataError(f"{name} has a palette, which makes 1 or 3 channels only")
            require_size([first.shape[first.axes.index(axis)] for axis in "YX"], name)
            yield file
    except (zlib.error, struct.error) as error:
        raise DataError(f"{name} is a damaged TIFF file ({error})") from error
    except (tifffile.TiffFileError, *TIFF_DAMAGE) as error:
        raise DataError(f"{name} cannot be read as TIFF ({error})") from error


def _orientation(file: "TiffFile") -> int:
    tag = file.pages.first.tags.get(TIFF_ORIENTATION)  # pyright: ignore[reportAttributeAccessIssue]
    value = 1 if tag is None else int(tag.value)
    return value if 1 <= value <= 8 else 1
