"""Picture files to tensors in [-1, 1]. What each kind of file becomes is a table, not luck.

| picture                        | becomes                                                    |
|--------------------------------|------------------------------------------------------------|
| 8-bit grey, black and white    | one channel, x / 127.5 - 1; 1, 2, 4 bits widened to 8      |
| 16-bit grey (PNG, TIFF, PGM)   | one channel, x / 32767.5 - 1, exact in float32             |
| 16-bit RGB (PNG, TIFF, PPM)    | three channels, x / 32767.5 - 1, exact in float32          |
| RGB, palette                   | three channels, x / 127.5 - 1                              |
| CMYK, YCCK, YCbCr, LAB         | turned into RGB                                            |
| any of these with transparency | laid over the background (`--preprocessing.background`),   |
|                                | rounded to the nearest; refused for 16-bit TIFF            |
| LA, RGBA, CMYK                 | their 2 or 4 channels, for a model of 2 or 4               |
| EXIF orientation               | applied; a damaged EXIF block counts as none               |
| several frames or pages        | the first (GIF, WebP, APNG, MPO, TIFF)                     |
| ICC profile, gamma chunk       | not applied: numbers stay; wide gamuts are not converted   |
| JPEG with `dct_scaling`        | decoded at 1/2, 1/4 or 1/8, never below the target size    |
| NumPy `.npy`                   | `[h, w]`, `[h, w, c]` or `[c, h, w]`, c the model's        |
| TIFF: one 16- or 32-bit sample | one channel                                                |
| TIFF: other depths, channels   | as they are, by tifffile (extra `scientific`), one page,   |
|                                | or a grey page for each channel                            |
| TIFF, white stored as zero     | turned around at 8 bits, as stored at more                 |
| PGM, PPM of another maximum    | stretched to the whole range                               |
| int8, int16, (u)int32, float   | scaled from the range that has to be declared              |
| NaN, infinity                  | NaN in every channel of that pixel: it does not count      |
| cut off, damaged, any other    | refused                                                    |

A declared range replaces the one of the number format, whatever that is. A model of three channels
shows 8-bit grey as RGB; a model of one channel takes the luma of 8-bit RGB (ITU-R BT.601). Any other
difference in the number of channels is refused, since nobody means it. `look.conversions` says which
of these happen to a picture.
"""

import io

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.arrays import NPY_MAGIC, TIFF_MAGIC, decode_npy, decode_tiff, look_at_tiff, upright
from ldmkit.data.look import (
    Look,
    by_tifffile,
    dct_scale,
    keeps_channels,
    lays_over,
    look_of,
)
from ldmkit.data.opening import open_picture, opens
from ldmkit.errors import DataError

LUMA = (0.299, 0.587, 0.114)
READ = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "CMYK", "LAB")
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")

Picture = Float[Tensor, "channels _height _width"]
"""Values in [-1, 1], or beyond where a declared range is narrower; NaN where a pixel does not count."""
Range = tuple[float, float]


def decode_picture(data: bytes, name: str, config: PreprocessingConfig) -> Picture:
    """Decode an encoded picture to `[channels, h, w]`, its range to [-1, 1].

    Args:
        data: the file's bytes.
        name: how to call it in errors.
        config: channels of the model, declared range, background of transparency, DCT scaling.

    Raises:
        DataError: it is no picture, is damaged, too large, of a kind that would lose precision, has
            other channels, or its numbers have no natural range and none is declared.
    """
    array = decode_array(data, name, config)
    _require_channels(array, name, config.channels)
    picture = _scaled(array, name, config.range)
    if len(picture) == 3 and config.channels == 1:
        return (picture * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    return picture.expand(config.channels, -1, -1)


def decode_array(data: bytes, name: str, config: PreprocessingConfig) -> np.ndarray:
    """The numbers of a picture file, `[h, w]` or `[h, w, c]`, as they are stored wherever that fits.

    Raises:
        DataError: as `decode_picture`.
    """
    if data.startswith(NPY_MAGIC):
        return decode_npy(data, name, config.channels)
    if data.startswith(TIFF_MAGIC) and not opens(data):
        return decode_tiff(data, name, config.channels, look_at_tiff(data, name).orientation)
    with open_picture(data, name) as image:
        look = look_of(image, data)
        if by_tifffile(look, config.channels):
            return decode_tiff(data, name, config.channels, look.orientation)
        if look.numbers == "uint" and look.bits == 16:
            return _deep(image, data, look, config)
        scale = dct_scale(look, config)
        if scale > 1:
            image = _drafted(image, look, scale, config.size)
        return _shallow(image, name, look, config)


def _shallow(image: Image.Image, name: str, look: Look, config: PreprocessingConfig) -> np.ndarray:
    """uint8 `[h, w]` or `[h, w, c]`, or other numbers of a grey TIFF file."""
    if look.format == "TIFF" and (look.bits > 8 or look.numbers != "uint"):
        return np.asarray(image)
    if image.mode not in READ:
        raise DataError(f"{name} has pixels of mode {image.mode}, which is not read")
    image.load()
    if look.turned and look.format != "TIFF":  # Pillow turns those as it reads them
        image = image.transpose(TRANSPOSE[look.orientation])
    if lays_over(look, config.channels):
        below = Image.new("RGBA", image.size, (*config.background_rgb, 255))
        image = Image.alpha_composite(below, image.convert("RGBA"))
        wanted = "L" if look.grey and config.channels == 1 else "RGB"
    elif keeps_channels(look, config.channels):
        wanted = "LA" if look.channels == 2 else "CMYK" if image.mode == "CMYK" else "RGBA"
    else:
        wanted = "L" if look.grey else "RGB"
    return np.asarray(image if image.mode == wanted else image.convert(wanted))


def _drafted(image: Image.Image, look: Look, scale: int, size: int) -> Image.Image:
    """A JPEG at a fraction of its size, without a last line that holds less than half a one."""
    image.draft(None, (size, size))
    width, height = (max(size, round(side / scale)) for side in (look.width, look.height))
    return image.crop((0, 0, width, height)) if (width, height) != image.size else image


def _deep(image: Image.Image, data: bytes, look: Look, config: PreprocessingConfig) -> np.ndarray:
    """uint16 `[h, w]` or `[h, w, c]` of a PNG, TIFF or PPM file."""
    array = np.asarray(image) if image.mode in DEEP_MODES else _deep_colours(image, data)
    array = array.astype(np.uint16)
    if look.turned and look.format != "TIFF":
        array = upright(array, look.orientation)
    if not look.alpha:
        return array
    array = np.atleast_3d(array)
    if array.shape[2] < look.channels:  # one value or colour is transparent
        opaque = (array != np.array(image.info["transparency"])).any(axis=2, keepdims=True)
        array = np.concatenate([array, opaque * np.uint16(65535)], axis=2)
    if not lays_over(look, config.channels):
        return array
    background = np.array(config.background_rgb) * 257.0
    if look.grey:
        background = np.atleast_1d(background @ np.array(LUMA))
    return lay_over(array, background.round().astype(np.uint32))


def _deep_colours(image: Image.Image, data: bytes) -> np.ndarray:
    """The 16-bit colours of a PNG or PPM file, `[h, w, c]`.

    Pillow keeps one byte of each: the higher, or, told that the numbers are little-endian, the lower.
    """
    tile = image.tile[0]  # pyright: ignore[reportAttributeAccessIssue]
    if image.format == "PPM":
        limit = np.uint32(tile.args[1])
        count = image.width * image.height * 3
        values = np.frombuffer(data, ">u2", count, tile.offset).astype(np.uint32)
        values = (values.clip(max=limit) * 65535 + limit // 2) // limit
        return values.reshape(image.height, image.width, 3)
    if tile.args == "LA;16B":
        image.tile = [tile._replace(args="RGBA")]  # pyright: ignore[reportAttributeAccessIssue]
        return np.asarray(image).view(">u2")
    high = np.asarray(image).astype(np.uint16)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
        args = tile.args.replace("16B", "16L")
        again.tile = [tile._replace(args=args)]  # pyright: ignore[reportAttributeAccessIssue]
        return high << 8 | np.asarray(again)


def lay_over(array: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Straight alpha over an opaque background, rounded to the nearest.

    Args:
        array: `[h, w, c + 1]`, unsigned integers of up to 16 bits, alpha last.
        background: `[c]`, of the same range.

    Returns:
        `[h, w, c]`, or `[h, w]` where c is 1.
    """
    most = np.uint32(np.iinfo(array.dtype).max)
    colours, alpha = array[:, :, :-1].astype(np.uint32), array[:, :, -1:].astype(np.uint32)
    mixed = (colours * alpha + background.astype(np.uint32) * (most - alpha) + most // 2) // most
    mixed = mixed.astype(array.dtype)
    return mixed[:, :, 0] if mixed.shape[2] == 1 else mixed


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
        values = torch.from_numpy(array.astype(np.float32)).movedim(2, 0)
        return values.div_(half).sub_(1.0)
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


TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what shows the picture upright (Exif 3.0, 4.6.5.1)."""
