"""Whether a PNG file is whole, by its own checksums (PNG specification, third edition, section 5).

Every byte of a PNG lies in its signature or in a chunk with a CRC, so any flipped bit is found without
decoding. Needs no torch.
"""

import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

from ldmkit.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIECE = 1 << 20


def require_whole_png(path: Path) -> None:
    """Check signature, lengths and CRCs.

    Raises:
        DataError: it is damaged, cut off, or no PNG.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise DataError(f"{path} is damaged: it does not begin as a PNG file does")
        while _checked_chunk(file, path) != b"IEND":
            pass
        if file.read(1):
            raise DataError(f"{path} is damaged: it has bytes after its end")


def _checked_chunk(file: BufferedIOBase, path: Path) -> bytes:
    """Read one chunk; returns its kind."""
    left, kind = struct.unpack(">I4s", _exactly(file.read(8), 8, path))
    crc = zlib.crc32(kind)
    while left:
        piece = file.read(min(left, PIECE))
        if not piece:
            raise DataError(f"{path} is damaged or cut off in its part {kind!r}")
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    if crc != int.from_bytes(_exactly(file.read(4), 4, path)):
        raise DataError(f"{path} is damaged: its part {kind!r} does not match its checksum")
    return kind


def _exactly(data: bytes, count: int, path: Path) -> bytes:
    if len(data) != count:
        raise DataError(f"{path} is damaged or cut off; make or copy it again")
    return data
