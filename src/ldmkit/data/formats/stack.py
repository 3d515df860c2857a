"""TIFF files whose pages are pictures, each of its own: one file, or a folder of them.

| page                            | becomes                                                   |
|---------------------------------|-----------------------------------------------------------|
| samples of any number and depth | as they are stored, channels last                         |
| one bit                         | 0 and 255                                                 |
| palette                         | 8-bit RGB                                                 |
| white is zero                   | turned round: the largest value of its bits minus x       |
| YCbCr, Lab and other colours    | refused; save them as RGB                                 |
| reduced copies, masks           | passed over, and said                                     |

The file is the group of its pages: they are held back together or not at all.
"""

import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ldmkit.data.arrays import TIFF_MAGIC, require_size
from ldmkit.data.formats.sidecars import suffix_of
from ldmkit.data.formats.slices import (
    MAX_PICTURES,
    OPEN_FILE,
    Listed,
    borrowed,
    named_if_damaged,
    npy_bytes,
    require_unchanged,
    scan_files,
)
from ldmkit.data.items import MAX_BYTES, Item, Problem, Source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED = 0, 1, 2, 3, 5
"""Photometric interpretations (TIFF 6.0, section 8)."""
AS_STORED = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, SEPARATED, 32803, 34892)
"""The last two are single samples of a sensor: colour filter array, linear raw."""
CLASSIC, BIG = ("H", 12, "I"), ("Q", 20, "Q")
"""Number format of the count of tags, bytes of a tag, number format of an offset."""


class TiffPage(NamedTuple):
    """One page of a TIFF file, as a Blob."""

    file: str
    size: int
    """Bytes of the file."""
    page: int

    @property
    def name(self) -> str:
        """The file and the number of the page, from 0."""
        return f"{self.file} (page {self.page})"

    def read(self) -> bytes:
        """The page as a `.npy` file.

        Raises:
            DataError: the file is damaged or has changed, or its compression needs another package.
        """
        tifffile = _tifffile()
        require_unchanged(self.file, self.size)
        key = ("tiff", self.file, str(self.size))
        with (
            named_if_damaged(self.name, "TIFF"),
            borrowed(key, lambda: tifffile.TiffFile(self.file), OPEN_FILE, _close) as file,
        ):
            page = file.pages[self.page]
            _require_readable(tifffile, page, self.name, self.size)
            return npy_bytes(_numbers(page, self.name))


def scan_stack(config: SourceConfig) -> Source:
    """List the pages of a TIFF file, or of all in a folder.

    Raises:
        DataError: nothing is there, or tifffile is missing.
    """
    _tifffile()
    return scan_files(config.data, "TIFF", _is_tiff, _pages_of)


def _tifffile() -> ModuleType:
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            "pages of TIFF files are read by tifffile: pip install 'ldmkit[scientific]'"
        ) from error
    return tifffile


def _close(file: Any) -> None:  # noqa: ANN401 - a tifffile.TiffFile
    file.close()


def _is_tiff(file: Listed) -> bool:
    return suffix_of(file.name) in ("tif", "tiff")


def _pages_of(listed: Listed, problems: list[Problem]) -> list[Item]:
    items: list[Item] = []
    with named_if_damaged(listed.path, "TIFF"), _tifffile().TiffFile(listed.path) as file:
        count = _count(listed, problems)
        _require_all_frames(file, count, listed.path)
        for number in range(count):
            blob = TiffPage(listed.path, listed.size, number)
            try:
                is_copy = _is_copy(file, blob)
            except DataError as error:
                problems.append(Problem("unusable page", blob.name, str(error)))
                continue
            if is_copy:
                text = f"{blob.name} is passed over: it is a reduced copy or a mask of another page"
                problems.append(Problem("not a picture", blob.name, text, "warning"))
                continue
            items.append(Item(f"{listed.name}#page-{number:04d}", blob, group=listed.name))
    return items


def _is_copy(file: Any, blob: TiffPage) -> bool:  # noqa: ANN401
    """Whether a page belongs to another one; it is checked, from its tags."""
    with named_if_damaged(blob.name, "TIFF"):
        page = file.pages[blob.page]
        _require_readable(_tifffile(), page, blob.name, blob.size)
        return bool(page.is_reduced or page.is_mask)


def _count(listed: Listed, problems: list[Problem]) -> int:
    """How many pages there are; a chain of pages that is cut off is a problem, not a shorter file."""
    count = 0
    with Path(listed.path).open("rb") as file:
        try:
            for _ in _page_offsets(file, listed):
                count += 1
        except DataError as error:
            problems.append(Problem("cut off", listed.path, str(error)))
    return count


def _page_offsets(file: BufferedReader, listed: Listed) -> Iterator[int]:
    """Where the directory of each page lies (TIFF 6.0, section 2)."""
    head = file.read(16)
    if head[:4] not in TIFF_MAGIC or len(head) < 16:
        raise DataError(f"{listed.path} is no TIFF file")
    order = "<" if head[:2] == b"II" else ">"
    big = 43 in head[2:4]
    count_format, tag_bytes, offset_format = BIG if big else CLASSIC
    (offset,) = struct.unpack_from(order + offset_format, head, 8 if big else 4)
    seen: set[int] = set()
    while offset:
        file.seek(offset)
        count = file.read(struct.calcsize(count_format))
        if len(count) == struct.calcsize(count_format):
            file.seek(struct.unpack(order + count_format, count)[0] * tag_bytes, 1)
        following = file.read(struct.calcsize(offset_format))
        if len(following) < struct.calcsize(offset_format) or offset in seen:
            raise DataError(f"{listed.path} is cut off or damaged after page {len(seen) - 1}")
        seen.add(offset)
        if len(seen) > MAX_PICTURES:
            raise DataError(f"{listed.path} has more than {MAX_PICTURES:,} pages")
        yield offset
        (offset,) = struct.unpack(order + offset_format, following)


def _require_all_frames(file: Any, pages: int, name: str) -> None:  # noqa: ANN401
    """Refuse a file that keeps many frames behind one page, as ImageJ does beyond 4 GiB."""
    if pages != 1 or not (file.is_imagej or file.is_shaped):
        return
    frames = int(np.prod(file.series[0].shape)) // max(1, int(np.prod(file.pages[0].shape)))
    if frames > 1:
        raise DataError(f"{name} keeps {frames} frames behind one page; save each as a page")


def _require_readable(tifffile: ModuleType, page: Any, name: str, size: int) -> None:  # noqa: ANN401
    """Check shape, colours, compression and place of a page, from its tags."""
    if not set("YX") <= set(page.axes) <= set("YXS"):
        raise DataError(f"{name} has the axes {page.axes}, which are not read")
    require_size([page.shape[page.axes.index(axis)] for axis in "YX"], name)
    if page.nbytes > MAX_BYTES:
        raise DataError(f"{name} has {page.nbytes:,} bytes; at most {MAX_BYTES:,} are read")
    if page.photometric not in (*AS_STORED, PALETTE):
        colours = getattr(page.photometric, "name", page.photometric)
        raise DataError(f"{name} has the colours {colours}; save it as grey or RGB")
    for table, number in (
        (tifffile.TIFF.DECOMPRESSORS, page.compression),
        (tifffile.TIFF.UNPREDICTORS, page.predictor),
    ):
        try:
            table[number]
        except KeyError as error:
            raise DataError(
                f"{name} is compressed as {getattr(number, 'name', number)}, which needs another "
                "package: pip install imagecodecs"
            ) from error
    ends = [
        place + count
        for place, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        if count
    ]
    if len(ends) != len(page.dataoffsets) or max(ends, default=size + 1) > size:
        raise DataError(f"{name} is cut off; copy the file again")


def _numbers(page: Any, name: str) -> np.ndarray:  # noqa: ANN401
    """`[h, w]` or `[h, w, c]` in the number format of the file."""
    stored = page.asarray(maxworkers=1)
    if "S" in page.axes:
        stored = np.moveaxis(stored, page.axes.index("S"), 2)
    if page.photometric == PALETTE:
        colours = (np.asarray(page.colormap) >> 8).astype(np.uint8)
        return np.moveaxis(colours[:, stored], 0, 2)
    if stored.dtype == np.bool_:
        stored = stored.astype(np.uint8) * 255
        return 255 - stored if page.photometric == WHITE_IS_ZERO else stored
    if page.photometric != WHITE_IS_ZERO:
        return stored
    if stored.dtype.kind != "u":
        raise DataError(f"{name} has {stored.dtype} values with white at zero; save it as grey")
    return stored.dtype.type(2 ** int(page.bitspersample) - 1) - stored
