"""What stands beside a picture: its caption, its mask; and which files are pictures at all."""

from ldmkit.errors import DataError

IMAGE_SUFFIXES = frozenset(
    ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "npy")
)
SIDECAR_SUFFIXES = frozenset(("txt", "json", "jsonl", "csv", "parquet", "cls", "md"))
MASK = "mask.png"
EMPTY_CAPTION = "empty caption"
"""The kind of problem, for all formats; `where` is the key of the picture."""
MAX_TEXT_BYTES = 1 << 20


def suffix_of(name: str) -> str:
    """The last extension of a file name, in small letters and without its dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def text_of(data: bytes, where: str) -> str:
    """The text of a sidecar.

    Raises:
        DataError: it is not UTF-8, or longer than any caption.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise DataError(f"the text of {where} has {len(data):,} bytes; at most 1 MiB is read")
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"the text of {where} is not UTF-8; save it as UTF-8") from error
