"""The files that one picture can become, each as bytes; with a line of text where they have room for it.

All but `npy` and `tiff32` are clipped to [-1, 1] and rounded to the nearest. Pillow writes what it can;
TIFF of 16 bits in colour, and of channels other than 1 and 3, is tifffile's (extra `scientific`).
"""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt16
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.pictures import decode_picture
from ldmkit.decode_configs import PictureFormat
from ldmkit.errors import UsageError
from ldmkit.facts import AutoencoderFacts
from ldmkit.output.provenance import IMAGE_DESCRIPTION, KEY, exif_of
from ldmkit.pixels import OneImage, Pixels, shown, to_pixels

Numbers = Shaped[np.ndarray, "height width _channels"]
MAX_SIDE = {"jpg": 65_535, "webp": 16_383}


class Note(NamedTuple):
    """What goes into a file beside the picture."""

    text: str
    """Provenance in ASCII; "" for none."""
    quality: int
    """Of JPEG and WebP, percent."""
    name: str
    """How to call the picture in errors."""


class Format(NamedTuple):
    """One kind of file."""

    suffix: str
    numbers: Literal["uint8", "uint16", "float32"]
    colours_only: bool
    """Whether it holds one channel (grey) and three (RGB) and no others."""
    encode: Callable[[Numbers, Note], bytes]
    for_looking: bool = True
    """Whether it may be asked for where the numbers hold less than the training pictures did."""
    carries_text: bool = True


def choose_format(wanted: Literal["auto", PictureFormat], facts: AutoencoderFacts) -> PictureFormat:
    """The file format: the one asked for, or the smallest that loses nothing.

    `auto` is PNG for what was trained on 8 bits of 1 or 3 channels, 16-bit PNG for 16 bits of
    these, and NumPy files for all others and wherever a range is declared.

    Raises:
        UsageError: the format cannot hold that many channels, or their depth; tifffile is missing.
    """
    channels, whole = facts.image_channels, facts.preprocessing.range is None
    if wanted == "auto":
        if not whole or channels not in (1, 3):
            return "npy"
        return "png" if facts.depth == "uint8" else "png16" if facts.depth == "uint16" else "npy"
    format_ = FORMATS[wanted]
    if format_.colours_only and channels not in (1, 3):
        raise UsageError(f"--format {wanted} cannot hold {channels} channels; take npy or tiff32")
    deep = not whole or facts.depth == "float32"
    if not format_.for_looking and (deep or facts.depth == "uint16"):
        given = "numbers in units of their own" if deep else "16 bits"
        fitting = "tiff32 or npy" if deep else "png16, tiff16 or npy"
        raise UsageError(
            f"--format {wanted} has 8 bits, and the autoencoder was trained on {given}; take {fitting}, "
            "or png to look at"
        )
    if wanted.startswith("tiff") and _needs_tifffile(channels, format_.numbers):
        _import_tifffile(wanted, channels)
    return wanted


def units_of(facts: AutoencoderFacts) -> tuple[float, float]:
    """The numbers of the training pictures that became -1 and 1."""
    natural = 65535.0 if facts.depth == "uint16" else 255.0
    return facts.preprocessing.range or (0.0, natural)


def encode_picture(
    image: OneImage, name: PictureFormat, units: tuple[float, float], note: Note
) -> bytes:
    """A picture in [-1, 1] as the bytes of a file.

    Args:
        image: on the CPU; NaN becomes mid-grey where numbers are whole.
        name: of the format.
        units: what -1 and 1 stand for in `npy` and `tiff32`.
        note: what goes with it.

    Raises:
        UsageError: the picture is too large for the format.
        DataError: the text is too long for it.
    """
    side = max(image.shape[1:])
    if side > MAX_SIDE.get(name, side):
        raise UsageError(f"--format {name} cannot hold {side} pixels in a row; take png")
    if FORMATS[name].numbers == "uint8":
        values = to_pixels(image[None])[0]
    elif FORMATS[name].numbers == "uint16":
        values = image.double().nan_to_num(0.0).add(1.0).mul(32767.5).round().clamp(0, 65535)
    else:
        low, high = units
        values = image.double() * ((high - low) / 2) + (low + high) / 2
    array = values.movedim(0, 2).numpy().astype(FORMATS[name].numbers)
    return FORMATS[name].encode(np.ascontiguousarray(array), note)


def pixels_of_file(
    data: bytes, name: PictureFormat, channels: int, units: tuple[float, float]
) -> Pixels:
    """`[1, 1 or 3, h, w]`: what is to be seen of a file that `encode_picture` made."""
    declared = units if FORMATS[name].numbers == "float32" else None
    config = PreprocessingConfig(channels=channels, range=declared)
    image = decode_picture(data, "a picture just written", config)
    return shown(to_pixels(image[None]))


def _image(array: Numbers) -> Image.Image:
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _png(array: Numbers, note: Note) -> bytes:
    if array.dtype == np.uint16 and array.shape[2] == 3:
        return _png_of_colours(array, {KEY: note.text} if note.text else {})
    info, file = PngInfo(), io.BytesIO()
    if note.text:
        info.add_text(KEY, note.text)
    _image(array).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _png_of_colours(array: UInt16[np.ndarray, "height width 3"], texts: Mapping[str, str]) -> bytes:
    """A 16-bit RGB PNG, which Pillow does not write; lines as differences (PNG 3, 9.2: filter Up).

    Args:
        array: of native byte order.
        texts: keyword -> text, Latin-1, for a text chunk each.
    """
    height, width, _ = array.shape
    lines = array.astype(">u2").view(np.uint8).reshape(height, width * 6)
    differences = np.diff(lines, axis=0, prepend=np.zeros_like(lines[:1]))
    filtered = np.insert(differences, 0, 2, axis=1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        *((b"tEXt", f"{key}\0{text}".encode("latin-1")) for key, text in texts.items()),
        (b"IDAT", zlib.compress(filtered.tobytes())),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _with_exif(kind: str) -> Callable[[Numbers, Note], bytes]:
    def encode(array: Numbers, note: Note) -> bytes:
        file = io.BytesIO()
        exif = exif_of(note.text, note.name) if note.text else b""
        lossless = kind == "WEBP" and note.quality == 100
        image = _image(array)
        if kind == "JPEG":
            image.save(file, kind, quality=note.quality, subsampling=0, exif=exif)
        else:
            image.save(file, kind, quality=note.quality, lossless=lossless, exif=exif)
        return file.getvalue()

    return encode


def _tiff(array: Numbers, note: Note) -> bytes:
    file, channels = io.BytesIO(), array.shape[2]
    if not _needs_tifffile(channels, array.dtype.name):
        tags = {IMAGE_DESCRIPTION: note.text} if note.text else {}
        _image(array).save(file, "TIFF", tiffinfo=tags)
        return file.getvalue()
    _import_tifffile("tiff", channels).imwrite(
        file,
        array if channels > 1 else array[:, :, 0],
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        description=note.text or None,
        software=False,
        metadata=None,
    )
    return file.getvalue()


def _needs_tifffile(channels: int, numbers: str) -> bool:
    return not (channels == 1 or (channels == 3 and numbers == "uint8"))


def _import_tifffile(wanted: str, channels: int):  # noqa: ANN202 - a module that may be missing
    try:
        import tifffile
    except ImportError as error:
        raise UsageError(
            f"--format {wanted} of {channels} channels is written by tifffile: pip install "
            "'ldmkit[scientific]', or take npy"
        ) from error
    return tifffile


def _npy(array: Numbers, note: Note) -> bytes:
    del note  # a NumPy file has no place for it
    file = io.BytesIO()
    np.save(file, array[:, :, 0] if array.shape[2] == 1 else array, allow_pickle=False)
    return file.getvalue()


FORMATS: dict[PictureFormat, Format] = {
    "png": Format("png", "uint8", True, _png),
    "jpg": Format("jpg", "uint8", True, _with_exif("JPEG"), for_looking=False),
    "webp": Format("webp", "uint8", True, _with_exif("WEBP"), for_looking=False),
    "png16": Format("png", "uint16", True, _png),
    "tiff": Format("tif", "uint8", False, _tiff, for_looking=False),
    "tiff16": Format("tif", "uint16", False, _tiff),
    "tiff32": Format("tif", "float32", False, _tiff),
    "npy": Format("npy", "float32", False, _npy, carries_text=False),
}
"""Format -> what is special about it."""
