"""NumPy archives (`.npz`): one, or a folder of them; their arrays are pictures, or pictures in a row.

| array                        | is                                                             |
|------------------------------|----------------------------------------------------------------|
| `[h, w]`                     | a picture                                                      |
| three axes                   | a picture where the first or last axis is one of channels: at  |
|                              | most 16 long and shorter than the others; else n grey pictures |
| `[n, ...]` with n labels     | n pictures, however short the axes are                         |
| four axes                    | n pictures `[h, w, c]` or `[c, h, w]`                          |
| n whole numbers, named so    | the labels of n pictures (`[n, 1]` too)                        |

Labels are called `labels`, `y_train` or the like, or `arr_1`. A channel axis of length 1 is dropped.
Arrays saved by `numpy.savez` are read by position; those of `savez_compressed` are inflated and held.
"""

import io
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldmkit.data.arrays import read_npy_header, require_size
from ldmkit.data.formats.sidecars import suffix_of
from ldmkit.data.formats.slices import (
    HELD_BYTES,
    MAX_PICTURES,
    Listed,
    borrowed,
    named_if_damaged,
    npy_bytes,
    require_unchanged,
    scan_files,
)
from ldmkit.data.items import MAX_BYTES, NO_LABEL, Item, Problem, Source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

MAX_CHANNELS = 16
"""Of a picture with three axes; a longer axis counts pictures or pixels."""
MAX_LABEL = 1_000_000
LABEL_WORDS = frozenset(("label", "labels", "y", "target", "targets", "class", "classes"))
PICTURE_WORDS = frozenset(("x", "data", "image", "images", "picture", "pictures"))
MAX_HEADER = 16384
"""Bytes of a member in which its header lies; NumPy reads none of more than 10,000."""
LOCAL_HEADER = 30
"""Bytes before the name in a zip's local header (APPNOTE.TXT 4.3.7); lengths stand at 26 and 28."""


class NpzArray(NamedTuple):
    """One array of an archive, as its header declares it."""

    file: str
    file_size: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    fortran: bool
    header: int
    """Bytes before the numbers in the member."""
    place: int | None
    """Where the numbers begin in the file; None where they are deflated."""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return _bytes_of(self.shape, self.dtype)


class NpzPicture(NamedTuple):
    """A picture in an archive, as a Blob."""

    array: NpzArray
    number: int | None
    """Which of n pictures; None where the array is one."""

    @property
    def name(self) -> str:
        """The file, the array and the number in it."""
        which = "" if self.number is None else f"[{self.number}]"
        return f"{self.array.file}/{self.array.name}{which}"

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return self.array.file_size

    def read(self) -> bytes:
        """The picture as a `.npy` file.

        Raises:
            DataError: the archive is damaged or has changed.
        """
        array = self.array
        require_unchanged(array.file, array.file_size)
        with named_if_damaged(self.name, "npz"):
            if self.number is None:
                numbers = _load(array)
            elif _is_held(array):
                key = (array.file, str(array.file_size), array.name)
                with borrowed(key, lambda: _load(array), array.nbytes) as whole:
                    numbers = whole[self.number]
            else:
                part = array._replace(shape=array.shape[1:])
                start = (array.place or 0) + self.number * part.nbytes
                numbers = _load(part._replace(place=start))
        return npy_bytes(_without_single_channel(numbers))


def scan_npz(config: SourceConfig) -> Source:
    """List the pictures of an archive, or of all in a folder; nothing but labels is read."""
    source = scan_files(config.data, "npz", _is_npz, _pictures_of)
    largest = max((item.label for item in source.items), default=NO_LABEL)
    return source._replace(class_names=tuple(str(number) for number in range(largest + 1)))


def _is_npz(file: Listed) -> bool:
    return suffix_of(file.name) == "npz"


def _pictures_of(file: Listed, problems: list[Problem]) -> list[Item]:
    with named_if_damaged(file.path, "npz"), zipfile.ZipFile(file.path) as archive:
        arrays = _arrays(file, archive, problems)
    items: list[Item] = []
    counts = {_count(array) for array in arrays if _are_pictures(array, arrays)}
    for array in arrays:
        beside = len(array.shape) <= 2 and _count(array) in counts
        if beside and _is_label_of(array, _count(array)):
            continue
        if len(array.shape) < 2 or beside:
            text = f"{array.file}/{array.name} of shape {list(array.shape)} is passed over"
            problems.append(Problem("not a picture", f"{file.name}/{array.name}", text, "warning"))
            continue
        try:
            items += _items(file, array, arrays, problems)
        except DataError as error:
            problems.append(Problem("unusable array", f"{file.name}/{array.name}", str(error)))
    return items


def _arrays(file: Listed, archive: zipfile.ZipFile, problems: list[Problem]) -> list[NpzArray]:
    members = [info for info in archive.infolist() if not info.is_dir()]
    times = Counter(info.filename for info in members)
    found = []
    for info in members:
        try:
            if times[info.filename] > 1:
                raise DataError(f"{file.path} holds {info.filename} more than once; save it again")
            if not info.filename.endswith(".npy"):
                text = f"{file.path}/{info.filename} is passed over, as it is no .npy member"
                where = f"{file.name}/{info.filename}"
                problems.append(Problem("not a picture", where, text, "warning"))
                continue
            with named_if_damaged(f"{file.path}/{info.filename}", "npz"):
                found.append(_described(file, archive, info))
        except DataError as error:
            where = f"{file.name}/{info.filename}"
            problems.append(Problem("damaged npz member", where, str(error)))
    return found


def _described(file: Listed, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NpzArray:
    """What the header says of an array, checked against what the file can hold."""
    name = f"{file.path}/{info.filename}"
    parts = info.filename.split("/")
    if info.flag_bits & 1:
        raise DataError(f"{name} is encrypted, which is not read; save it again")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{name} is compressed as NumPy does not; save it with numpy.savez")
    if ".." in parts or "" in parts or "\\" in info.filename or not info.filename.isprintable():
        raise DataError(f"{file.path} holds a member named {info.filename!r}; name it plainly")
    with archive.open(info) as member:
        beginning = io.BytesIO(member.read(MAX_HEADER))
    shape, fortran, dtype = _npy_header(beginning)
    header = beginning.tell()
    if dtype.hasobject:
        raise DataError(f"{name} holds Python objects, which are not read; save numbers")
    array = NpzArray(
        file.path, file.size, info.filename[:-4], shape, dtype.str, fortran, header, None
    )
    if dtype.fields is not None or header + array.nbytes != info.file_size:
        raise DataError(f"{name} does not hold the bytes that its header says; save it again")
    if array.nbytes > MAX_BYTES and info.compress_type == zipfile.ZIP_DEFLATED:
        raise DataError(
            f"{name} inflates to {array.nbytes:,} bytes; at most {MAX_BYTES:,} are read"
        )
    if info.compress_type == zipfile.ZIP_DEFLATED:
        return array
    return array._replace(place=_place(file, info) + header)


def _npy_header(member: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    shape, fortran, dtype = read_npy_header(member)
    if any(side < 0 for side in shape):
        raise DataError("an axis is negative")
    return shape, fortran, dtype


def _place(file: Listed, info: zipfile.ZipInfo) -> int:
    """Where a stored member begins, which only its local header tells."""
    with Path(file.path).open("rb") as raw:
        raw.seek(info.header_offset)
        header = raw.read(LOCAL_HEADER)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    place = info.header_offset + LOCAL_HEADER + lengths
    if place + info.file_size > file.size:
        raise DataError(f"{file.path} is cut off at {info.filename}; copy it again")
    return place


def _items(
    file: Listed, array: NpzArray, arrays: list[NpzArray], problems: list[Problem]
) -> list[Item]:
    several = _are_pictures(array, arrays)
    name = f"{array.file}/{array.name}"
    shape = array.shape[1:] if several else array.shape
    if len(array.shape) > 4 or np.dtype(array.dtype).kind not in "buif":
        raise DataError(
            f"{name} has the shape {list(array.shape)} and type {array.dtype}; "
            "numbers with two, three or four axes are read"
        )
    channels = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] == min(shape)]
    require_size([side for axis, side in enumerate(shape) if axis not in channels[:1]], name)
    if _bytes_of(shape, array.dtype) > MAX_BYTES:
        raise DataError(f"{name} has pictures of more than {MAX_BYTES:,} bytes")
    if not several:
        return [Item(f"{file.name}#{array.name}", NpzPicture(array, None))]
    if _count(array) > MAX_PICTURES:
        raise DataError(f"{name} has {_count(array):,} pictures; at most {MAX_PICTURES:,} are read")
    if _is_held(array) and array.nbytes > HELD_BYTES:
        raise DataError(
            f"{name} inflates to {array.nbytes:,} bytes; save it with numpy.savez in C order, "
            "which is read by position"
        )
    labels = _labels_of(array, arrays, problems)
    return [
        Item(f"{file.name}#{array.name}-{index:06d}", NpzPicture(array, index), label)
        for index, label in enumerate(labels)
    ]


def _count(array: NpzArray) -> int:
    """Entries along the first axis; -1 for a single number."""
    return next(iter(array.shape), -1)


def _are_pictures(array: NpzArray, arrays: list[NpzArray]) -> bool:
    """Whether the first axis counts pictures."""
    if len(array.shape) != 3:
        return len(array.shape) == 4
    if any(_is_label_of(other, array.shape[0]) for other in arrays):
        return True
    first, middle, last = array.shape
    outer = sorted((first, last))
    return not (outer[0] <= MAX_CHANNELS and outer[0] < min(middle, outer[1]))


def _is_label_of(array: NpzArray, count: int) -> bool:
    """Whether it holds `count` whole numbers and is called like labels."""
    if np.dtype(array.dtype).kind not in "iu" or array.shape not in ((count,), (count, 1)):
        return False
    return bool(_words(array.name) & LABEL_WORDS or re.fullmatch(r"arr_\d+", array.name))


def _labels_of(array: NpzArray, arrays: list[NpzArray], problems: list[Problem]) -> list[int]:
    """A label for each picture; -1 without any, or where it is not clear which array holds them."""
    nothing = [NO_LABEL] * array.shape[0]
    rest = _part(array.name)
    found = [other for other in arrays if _is_label_of(other, array.shape[0])]
    found = [other for other in found if not rest or _part(other.name) in (rest, frozenset())]
    same = [other for other in found if _part(other.name) == rest]
    found = same if len(same) == 1 else found
    if len(found) > 1:
        names = ", ".join(other.name for other in found)
        text = f"{array.file}: {names} could all be the labels of {array.name}; none is used"
        problems.append(Problem("unclear labels", f"{array.file}/{array.name}", text, "warning"))
    if len(found) != 1:
        return nothing
    with named_if_damaged(f"{array.file}/{found[0].name}", "npz"):
        if found[0].nbytes > HELD_BYTES:
            raise DataError(f"{array.file}/{found[0].name} is too large for labels")
        labels = _load(found[0]).reshape(-1)
    if labels.size and (labels.min() < NO_LABEL or labels.max() > MAX_LABEL):
        raise DataError(
            f"{array.file}/{found[0].name} holds labels from {labels.min()} to {labels.max()}; "
            f"class indices lie between 0 and {MAX_LABEL:,} (-1 = none)"
        )
    return labels.tolist()


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[^a-z0-9]+", name.lower()))


def _part(name: str) -> frozenset[str]:
    """Which part of a data set a name speaks of: {"train"} for `x_train` and `train_labels`."""
    numbered = re.fullmatch(r"arr_\d+", name)
    return frozenset() if numbered else _words(name) - LABEL_WORDS - PICTURE_WORDS


def _is_held(array: NpzArray) -> bool:
    """Whether single pictures cannot be read by position."""
    return array.place is None or array.fortran


def _load(array: NpzArray) -> np.ndarray:
    if array.place is not None:
        with Path(array.file).open("rb") as file:
            file.seek(array.place)
            data = file.read(array.nbytes)
    else:
        with zipfile.ZipFile(array.file) as archive, archive.open(f"{array.name}.npy") as member:
            member.read(array.header)
            data = member.read(array.nbytes)
    if len(data) != array.nbytes:
        raise DataError(f"{array.file} is cut off at {array.name}; copy it again")
    order = "F" if array.fortran else "C"
    return np.frombuffer(data, array.dtype).reshape(array.shape, order=order)


def _bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    total = np.dtype(dtype).itemsize
    for side in shape:
        total *= side
    return total


def _without_single_channel(numbers: np.ndarray) -> np.ndarray:
    if numbers.ndim == 3 and 1 in (numbers.shape[0], numbers.shape[2]):
        return numbers[..., 0] if numbers.shape[2] == 1 else numbers[0]
    return numbers
