"""Picture files to tensors in [-1, 1]. What each kind of file becomes is a table, not luck.

| picture                        | becomes                                                    |
|--------------------------------|------------------------------------------------------------|
| 8-bit grey, black and white    | one channel, x / 127.5 - 1                                 |
| 16-bit grey (PNG, TIFF, PGM)   | one channel, x / 32767.5 - 1, exact in float32             |
| RGB, YCbCr, CMYK, palette      | three channels, x / 127.5 - 1                              |
| any of these with alpha        | laid over white first                                      |
| LA, RGBA, CMYK                 | their 2 or 4 channels, for a model of 2 or 4               |
| EXIF orientation               | applied                                                    |
| several frames                 | the first                                                  |
| NumPy `.npy`                   | `[h, w]`, `[h, w, c]` or `[c, h, w]`, c the model's        |
| TIFF: one 16- or 32-bit sample | one channel                                                |
| TIFF: other depths, channels   | as they are, by tifffile (extra `scientific`), one page,   |
|                                | or a grey page for each channel; orientation not applied   |
| int8, int16, (u)int32, float   | scaled from the range that has to be declared              |
| NaN, infinity                  | NaN in every channel of that pixel: it does not count      |
| 16-bit RGB PNG                 | refused: Pillow would cut it to 8 bits                     |

A declared range replaces the one of the number format, whatever that is. A model of three channels
shows 8-bit grey as RGB; a model of one channel takes the luma of 8-bit RGB (ITU-R BT.601). Any other
difference in the number of channels is refused, since nobody means it.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldmkit.data.arrays import (
    NPY_MAGIC,
    TIFF_MAGIC,
    decode_npy,
    decode_tiff,
    pillow_keeps,
    require_size,
)
from ldmkit.errors import DataError

LUMA = (0.299, 0.587, 0.114)
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L")
COLOUR = ("RGB", "YCbCr", "CMYK", "HSV", "LAB")
AS_STORED = ("LA", "RGBA", "CMYK")
NUMBERS = ("F", "I")

Picture = Float[Tensor, "channels _height _width"]
"""Values in [-1, 1], or beyond where a declared range is narrower; NaN where a pixel does not count."""
Range = tuple[float, float]


def decode_picture(
    data: bytes, name: str, channels: int, value_range: Range | None = None
) -> Picture:
    """Decode an encoded picture to `[channels, h, w]`, its range to [-1, 1].

    Args:
        data: the file's bytes.
        name: how to call it in errors.
        channels: of the model.
        value_range: the values that become -1 and 1; None for the whole range of uint8 and uint16.

    Raises:
        DataError: it is no picture, is damaged, too large, of a kind that would lose precision, has
            other channels, or its numbers have no natural range and none is declared.
    """
    array = decode_array(data, name, channels)
    _require_channels(array, name, channels)
    picture = _scaled(array, name, value_range)
    if len(picture) == 3 and channels == 1:
        return (picture * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    return picture.expand(channels, -1, -1)


def decode_array(data: bytes, name: str, channels: int) -> np.ndarray:
    """The numbers of a picture file as they are stored, `[h, w]` or `[h, w, c]`.

    Raises:
        DataError: as `decode_picture`.
    """
    if data.startswith(NPY_MAGIC):
        return decode_npy(data, name, channels)
    if data.startswith(TIFF_MAGIC) and not pillow_keeps(data, channels):
        return decode_tiff(data, name, channels)
    with open_picture(data, name) as image:
        return _to_array(image, name, channels)


@contextlib.contextmanager
def open_picture(data: bytes, name: str) -> Iterator[Image.Image]:
    """A picture as Pillow opens it; its size is checked, its pixels are not yet read.

    Raises:
        DataError: it is no picture, too large, or damaged, also where that shows in the block only.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked here, from the header
            with Image.open(io.BytesIO(data)) as image:
                require_size([image.width, image.height], name)
                yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is a damaged picture ({error})") from error


def _to_array(image: Image.Image, name: str, channels: int) -> np.ndarray:
    """uint8 `[h, w]` or `[h, w, c]`, or uint16, int32 or float32 `[h, w]`."""
    tiles = getattr(image, "tile", [])  # how Pillow reads it: the last item is the raw mode
    deep = tiles and "16" in str(tiles[0][3])
    if deep and image.mode not in (*SIXTEEN_BIT, *NUMBERS):
        raise DataError(
            f"{name} has 16 bits for each colour channel, which is read from TIFF and NumPy files only"
        )
    file_format = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT or (file_format, image.mode) == ("PPM", "I"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in NUMBERS and file_format == "TIFF":
        return np.asarray(image)
    if image.mode in AS_STORED and len(image.getbands()) == channels:
        return np.asarray(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        grey = image.mode in ("LA", "La")
        return np.asarray(
            Image.alpha_composite(white, image.convert("RGBA")).convert("L" if grey else "RGB")
        )
    if image.mode in GREY:
        return np.asarray(image.convert("L"))
    if image.mode in COLOUR or image.mode == "P":
        return np.asarray(image.convert("RGB"))
    raise DataError(f"{name} has pixels of mode {image.mode}, which is not read")


def _require_channels(array: np.ndarray, name: str, channels: int) -> None:
    found = 1 if array.ndim == 2 else array.shape[2]
    if found == channels or (array.dtype == np.uint8 and {found, channels} == {1, 3}):
        return
    kind = "16-bit grey" if (found, array.dtype.name) == (1, "uint16") else f"of {found} channel(s)"
    raise DataError(
        f"{name} is {kind} and the model takes {channels}; "
        f"train one with --preprocessing.channels {found}"
    )


def _scaled(array: np.ndarray, name: str, value_range: Range | None) -> Picture:
    array = np.atleast_3d(array)
    if value_range is None and array.dtype in (np.uint8, np.uint16):
        half = np.iinfo(array.dtype).max / 2
        return torch.from_numpy(array.astype(np.float32)).movedim(2, 0) / half - 1.0
    if array.dtype.kind not in "iuf":
        raise DataError(f"{name} has values of type {array.dtype}, which are not read")
    if value_range is None:
        raise DataError(
            f"{name} has {array.dtype} values, whose range must be declared: train the autoencoder "
            "with --preprocessing.range LO,HI (the values that become -1 and 1)"
        )
    low, high = value_range
    with np.errstate(all="ignore"):  # what overflows float32 is far outside the range
        # from the middle, so that small values of a symmetric range keep all their digits
        values = (array.astype(np.float64) - (low + high) / 2) / ((high - low) / 2)
        values[~np.isfinite(values).all(axis=2)] = np.nan
        return torch.from_numpy(values.astype(np.float32)).movedim(2, 0)
