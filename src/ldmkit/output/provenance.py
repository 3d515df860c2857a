"""What a picture was made of, written into its file: one JSON document, in ASCII.

    PNG         text chunk `ldmkit`
    JPEG, WebP  EXIF UserComment (Exif 3.0, 4.6.6: eight bytes name the characters)
    TIFF        ImageDescription

NumPy files have no place for it; `listing` has a line for them. Imports no torch.
"""

import io
import json
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from ldmkit.errors import DataError

Provenance = dict[str, Any]
KEY = "ldmkit"
ASCII = b"ASCII\0\0\0"
MAX_EXIF = 65_000
"""Bytes of a comment in EXIF at most: a JPEG's segment has two for its length."""
IMAGE_DESCRIPTION = 270
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", *TIFF)
"""How the files begin that can carry provenance."""


def as_text(record: Provenance) -> str:
    """A record as one line of JSON; all but ASCII is escaped, as EXIF and TIFF want it."""
    return json.dumps(record, ensure_ascii=True, sort_keys=True)


def exif_of(text: str, name: str) -> bytes:
    """An EXIF block with the text as its UserComment.

    Raises:
        DataError: it is too long for a JPEG.
    """
    comment = ASCII + text.encode("ascii")
    if len(comment) > MAX_EXIF:
        raise DataError(
            f"the provenance of {name} has {len(comment):,} bytes, and EXIF holds {MAX_EXIF:,}: take "
            "--format png, or --no-provenance"
        )
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def may_carry(path: Path) -> bool:
    """Whether a file begins as one that can carry provenance does; False for what cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(MAGIC)
    except OSError:
        return False


def provenance_of(path: Path) -> Provenance | None:
    """What a picture says it was made of; None where it says nothing that ldmkit wrote.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    try:
        text = _text_of(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, SyntaxError, TypeError, LookupError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    return _record(text)


def _text_of(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "TIFF":
                return str(image.getexif().get(IMAGE_DESCRIPTION, ""))
            if image.format == "PNG":
                return str(image.info.get(KEY, ""))
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    except UnidentifiedImageError:
        return _tiff_text(data) if data.startswith(TIFF) else ""
    if not isinstance(comment, bytes) or not comment.startswith(ASCII):
        return ""
    return comment[len(ASCII) :].decode("ascii", "replace")


def _tiff_text(data: bytes) -> str:
    """Of a TIFF file that Pillow does not open."""
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            "Pillow does not read such TIFF files, tifffile does: pip install 'ldmkit[scientific]'"
        ) from error
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            tag = file.pages.first.tags.get(IMAGE_DESCRIPTION)
    except tifffile.TiffFileError as error:
        raise DataError(f"a damaged TIFF file ({error})") from error
    return "" if tag is None else str(tag.value)


def _record(text: str) -> Provenance | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and KEY in record else None
