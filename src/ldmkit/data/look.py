"""What a picture file is, from its header alone, and what decoding will do to its numbers.

`pictures` decodes by what is found here, so that what is said of a picture is what happens to it.
"""

import re
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.arrays import NPY_MAGIC, TIFF_MAGIC, Header, look_at_npy, look_at_tiff
from ldmkit.data.opening import frames_of, open_picture, opens, orientation_of

SUFFIXES = {
    "png": ("PNG",),
    "apng": ("PNG",),
    "jpg": ("JPEG", "MPO"),
    "jpeg": ("JPEG", "MPO"),
    "webp": ("WEBP",),
    "gif": ("GIF",),
    "bmp": ("BMP", "DIB"),
    "tif": ("TIFF",),
    "tiff": ("TIFF",),
    "ppm": ("PPM",),
    "pgm": ("PPM",),
    "pbm": ("PPM",),
    "npy": ("NPY",),
}
"""Extension -> formats that it stands for."""
GREY_BY_PILLOW = (("uint", 12), ("uint", 16), ("int", 16), ("int", 32), ("float", 32))
"""Numbers of single-sample TIFF files, and their bits, that Pillow keeps."""
TIFF_BITS, TIFF_SAMPLES, TIFF_SAMPLE_FORMAT = 258, 277, 339
"""Tags of a TIFF file (TIFF 6.0, sections 4 and 19)."""
TIFF_NUMBERS = {1: "uint", 2: "int", 3: "float"}
DCT_SCALES = (8, 4, 2)


class Look(NamedTuple):
    """What the header of a picture file says."""

    format: str
    """As Pillow calls it ("PNG", "JPEG", "MPO", "TIFF" ...), or "NPY"."""
    mode: str
    """As Pillow calls it; "" where only tifffile reads the file; the axes "hw", "hwc", "chw" of NPY."""
    width: int
    """As stored, pixels."""
    height: int
    bits: int
    """Of one stored value: 1, 2, 4, 5 (16-bit BMP), 8, 12, 16, 32 or 64."""
    channels: int
    """Values of one pixel, alpha included; a palette counts as the colours in it."""
    numbers: str = "uint"
    """Kind of the numbers: "uint", "int", "float", or another of NumPy."""
    frames: int = 1
    """Pages or frames of an animation; 2 where more follow, but what follows is damaged."""
    orientation: int = 1
    """EXIF: 1 = upright, 2 to 8 = mirrored or turned."""
    alpha: bool = False
    """Whether it has an alpha channel, or a colour or palette entries that are transparent."""
    palette: bool = False
    inverted: bool = False
    """Whether white is stored as zero and Pillow turns that around (8-bit TIFF)."""
    stretched: bool = False
    """Whether the largest value is declared to be below the type's (PGM, PPM) and is raised to it."""

    @property
    def turned(self) -> bool:
        """Whether it is shown turned or mirrored."""
        return self.orientation != 1

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width when shown upright, pixels."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def grey(self) -> bool:
        """Whether it has no colour, by its kind (not by its pixels)."""
        return self.channels - self.alpha == 1


def look_at(data: bytes, name: str) -> Look:
    """What the header of a picture file says; no pixels are read.

    A `[c, h, w]` array of NumPy is told from `[h, w, c]` by its shorter outer axis.

    Args:
        data: the file's bytes.
        name: how to call it in errors.

    Raises:
        DataError: it is no picture, has too many pixels or none, or its header is damaged.
    """
    if data.startswith(NPY_MAGIC):
        return _look_by("NPY", look_at_npy(data, name))
    if data.startswith(TIFF_MAGIC) and not opens(data):
        return _look_by("TIFF", look_at_tiff(data, name))
    with open_picture(data, name) as image:
        return look_of(image, data)._replace(frames=frames_of(image))


def conversions(look: Look, name: str, config: PreprocessingConfig) -> tuple[str, ...]:
    """What decoding changes beyond scaling the numbers: a few words each, the same for all of a kind.

    Args:
        look: of the picture.
        name: its file name, for the extension.
        config: the preprocessing.
    """
    channels = config.channels
    by_pillow = not by_tifffile(look, channels)
    first = look.frames > 1 and not stacks_pages(look, channels)
    from_other = look.mode in ("CMYK", "LAB", "YCbCr") and not keeps_channels(look, channels)
    changes = {
        "extension does not fit the content": not _suffix_fits(look, name),
        "first of several frames taken": first,
        "turned upright by EXIF": look.turned,
        "decoded at a fraction of its size (DCT scaling)": dct_scale(look, config) > 1,
        f"{look.bits} bit widened to 8": by_pillow and look.bits < 8 and not look.palette,
        "values stretched to the whole range": look.stretched,
        "inverted, since white is stored as zero": by_pillow and look.inverted,
        "palette turned into RGB": look.palette,
        f"{look.mode} turned into RGB": from_other,
        f"transparency laid over {config.background}": lays_over(look, channels),
        "grey shown as RGB": look.grey and channels == 3,
        "colour turned into grey (BT.601 luma)": not look.grey and channels == 1,
        "smaller than the target size, enlarged": min(look.shape) < config.size
        and config.resize != "none",
    }
    return tuple(text for text, happens in changes.items() if happens)


def keeps_channels(look: Look, channels: int) -> bool:
    """Whether a model of that many channels gets them as they are stored, alpha or ink included."""
    if look.mode in ("", "hwc", "chw"):
        return True
    return channels in (2, 4) and look.channels == channels


def lays_over(look: Look, channels: int) -> bool:
    """Whether transparency is laid over the background."""
    return look.alpha and not keeps_channels(look, channels) and not by_tifffile(look, channels)


def by_tifffile(look: Look, channels: int) -> bool:
    """Whether tifffile must read it, since Pillow would cut bits or channels."""
    if look.format != "TIFF" or not look.mode:
        return look.format == "TIFF"
    if look.bits <= 8 and look.numbers == "uint":
        return channels not in (1, 3)
    return channels != 1 or look.channels != 1 or (look.numbers, look.bits) not in GREY_BY_PILLOW


def stacks_pages(look: Look, channels: int) -> bool:
    """Whether the grey pages of a TIFF file become the channels of one picture."""
    return by_tifffile(look, channels) and look.channels == 1 and look.frames == channels


def dct_scale(look: Look, config: PreprocessingConfig) -> int:
    """How much smaller a JPEG is decoded: 8, 4, 2, or 1; never below the target size."""
    if not config.dct_scaling or config.resize == "none" or look.format not in ("JPEG", "MPO"):
        return 1
    most = min(look.width, look.height) // config.size
    return next((scale for scale in DCT_SCALES if scale <= most), 1)


def look_of(image: Image.Image, data: bytes) -> Look:
    """What a picture's header says; frames are not counted."""
    raw, limit = _raw_mode(image)
    numbers, bits = _numbers(image, raw, limit)
    tags = getattr(image, "tag_v2", None)
    palette = image.mode in ("P", "PA")
    alpha = image.has_transparency_data
    channels = 3 if palette else len(image.getbands())
    if raw.startswith("LA"):
        channels = 2  # of 16 bits, which Pillow opens as RGBA
    if alpha and image.mode in ("P", "PA", "1", "L", "RGB", "I;16"):
        channels += 1
    if tags is not None and not palette:
        channels = int(tags.get(TIFF_SAMPLES, 1))
    width, height = getattr(image, "_tile_size", image.size)  # of a TIFF, before it is turned
    return Look(
        format=image.format or "",
        mode=image.mode,
        width=width,
        height=height,
        bits=bits,
        channels=channels,
        numbers=numbers,
        orientation=orientation_of(image, data),
        alpha=alpha,
        palette=palette,
        inverted=tags is not None and bits <= 8 and raw.endswith((";I", ";IR")),
        stretched=limit not in (0, 255, 65535),
    )


def _look_by(file_format: str, header: Header) -> Look:
    return Look(
        format=file_format,
        mode=header.mode,
        width=header.width,
        height=header.height,
        bits=header.bits,
        channels=header.channels,
        numbers=header.numbers,
        frames=header.frames,
        orientation=header.orientation,
    )


def _raw_mode(image: Image.Image) -> tuple[str, int]:
    """How Pillow reads the pixels, and the largest value that a PPM declares (0 = none)."""
    tiles = getattr(image, "tile", [])
    args = tiles[0].args if tiles else ""
    if isinstance(args, tuple):
        limit = args[1] if image.format == "PPM" and len(args) == 2 else 0
        return str(args[0]) if args else "", limit
    return str(args or ""), 0


def _numbers(image: Image.Image, raw: str, limit: int) -> tuple[str, int]:
    """Kind and bits of one stored value."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        kinds = set(image.tag_v2.get(TIFF_SAMPLE_FORMAT, (1,)))
        kind = TIFF_NUMBERS.get(kinds.pop(), "mixed") if len(kinds) == 1 else "mixed"
        return kind, max(image.tag_v2.get(TIFF_BITS, (1,)))
    if image.mode == "F":
        return "float", 32
    if image.mode == "1":
        return "uint", 1
    if "16B" in raw or "I;16" in image.mode or limit > 255 or image.mode == "I":
        return "uint", 16
    few = re.search(r"^(L|P|BGR);(\d+)", raw)
    if few is None:
        return "uint", 8
    return "uint", 5 if few[1] == "BGR" else int(few[2])


def _suffix_fits(look: Look, name: str) -> bool:
    suffix = name.rpartition(".")[2].lower()
    return look.format in SUFFIXES.get(suffix, (look.format,))
