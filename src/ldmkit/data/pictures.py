"""Picture files to tensors in [-1, 1]. What each kind of file becomes is a table, not luck.

| picture                     | becomes                                                  |
|-----------------------------|----------------------------------------------------------|
| 8-bit grey, black and white | one channel, x / 127.5 - 1                               |
| 16-bit grey                 | one channel, x / 32767.5 - 1, exact in float32           |
| RGB, YCbCr, CMYK, palette   | three channels, x / 127.5 - 1                            |
| any of these with alpha     | laid over white first                                    |
| EXIF orientation            | applied                                                  |
| several frames              | the first                                                |
| 16-bit RGB, 32-bit, float   | refused: Pillow would cut them to 8 bits                 |

A model of three channels shows grey as RGB; a model of one channel takes the luma of RGB (ITU-R
BT.601). 16-bit grey is refused by a model of three channels, since nobody means that.
"""

import io
import warnings

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldmkit.errors import DataError

MAX_PIXELS = 100_000_000
LUMA = (0.299, 0.587, 0.114)
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L")
COLOUR = ("RGB", "YCbCr", "CMYK", "HSV", "LAB")

Picture = Float[Tensor, "channels _height _width"]


def decode_picture(data: bytes, name: str, channels: int) -> Picture:
    """Decode an encoded picture to `[channels, h, w]` in [-1, 1].

    Args:
        data: the file's bytes.
        name: how to call it in errors.
        channels: 1 or 3.

    Raises:
        DataError: it is no picture, is damaged, too large, or of a kind that would lose precision.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # the size is checked here, from the header
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read"
                )
            array = _to_array(image, name)
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is a damaged picture ({error})") from error
    return _with_channels(array, name, channels)


def _to_array(image: Image.Image, name: str) -> np.ndarray:
    """uint8 `[h, w]` or `[h, w, 3]`, or uint16 `[h, w]`."""
    tiles = getattr(image, "tile", [])  # how Pillow reads it: the last item is the raw mode
    if tiles and "16" in str(tiles[0][3]) and image.mode not in SIXTEEN_BIT:
        raise DataError(f"{name} has 16 bits for each colour channel, which is not read")
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT:
        return np.asarray(image).astype(np.uint16)
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


def _with_channels(array: np.ndarray, name: str, channels: int) -> Picture:
    if array.dtype == np.uint16 and channels == 3:
        raise DataError(
            f"{name} is 16-bit grey and the model takes RGB; train one with --preprocessing.channels 1"
        )
    half = 32767.5 if array.dtype == np.uint16 else 127.5
    picture = torch.from_numpy(np.atleast_3d(array).astype(np.float32)).movedim(2, 0) / half - 1.0
    if len(picture) == 3 and channels == 1:
        return (picture * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    return picture.expand(channels, -1, -1)
