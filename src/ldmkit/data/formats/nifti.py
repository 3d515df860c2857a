"""NIfTI volumes (`.nii`, `.nii.gz`): one, or a folder of them; their slices are pictures.

Volumes are first turned to the axes right, anterior, superior (RAS; the nearest to what the file's
affine says, nothing is resampled), so that `--axis` means the same in all of them:

| axis | slices   | rows, from the top | columns, from the left |
|------|----------|--------------------|------------------------|
| 0    | sagittal | superior first     | posterior first        |
| 1    | coronal  | superior first     | left first             |
| 2    | axial    | anterior first     | left first             |

The fourth axis (time) gives further slices, the fifth (vectors) and RGB give channels. Values are those
the file means: `scl_slope * stored + scl_inter`. The group is the subject (`sub-01` in the path), else
the file. A `.nii` is read by position; a `.nii.gz` is inflated and held for its next slices.
"""

import gzip
import math
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ldmkit.data.arrays import require_size
from ldmkit.data.formats.slices import (
    HELD_BYTES,
    MAX_PICTURES,
    OPEN_FILE,
    Listed,
    borrowed,
    named_if_damaged,
    npy_bytes,
    require_unchanged,
    rescaled,
    scan_files,
)
from ldmkit.data.items import Item, Problem, Source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError

AXIAL = 2
MAX_HEADER = 64 << 20
"""Header and extensions: they lie before the voxels and are read whole."""
INFLATED_AT_MOST = 1040
"""How many times its size deflated data can be, at the very most (1032 and some slack)."""


class Volume(NamedTuple):
    """A file of voxels, as its header declares it."""

    path: str
    size: int
    """Bytes of the file."""
    shape: tuple[int, int, int]
    """Right, anterior, superior."""
    times: int
    nbytes: int
    """Of all voxels."""
    slope: float
    intercept: float


class NiftiSlice(NamedTuple):
    """One slice of a volume, as a Blob."""

    volume: Volume
    axis: int
    """Of the turned volume."""
    slice_index: int
    time: int

    @property
    def name(self) -> str:
        """The file, the axis and where on it."""
        return f"{self.volume.path} (axis {self.axis}, slice {self.slice_index}, time {self.time})"

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.volume.size

    def read(self) -> bytes:
        """The slice as a `.npy` file, `[h, w]` or `[h, w, c]`, in the units of the file.

        Raises:
            DataError: the file is damaged or has changed.
        """
        path, size = self.volume.path, self.volume.size
        require_unchanged(path, size)
        held = self.volume.nbytes if _is_zipped(path) else OPEN_FILE
        with (
            named_if_damaged(path, "NIfTI"),
            borrowed(("nifti", path, str(size)), lambda: _turned(path), held) as turned,
        ):
            part = np.moveaxis(turned[:, :, :, self.time], self.axis, 0)[self.slice_index]
            upright = np.array(np.swapaxes(part, 0, 1)[::-1])  # a copy: the file may be forgotten
            numbers = rescaled(upright, self.volume.slope, self.volume.intercept)
        return npy_bytes(numbers[..., 0] if numbers.shape[2] == 1 else numbers)


def scan_nifti(config: SourceConfig) -> Source:
    """List the slices of a volume, or of all in a folder; headers are read, voxels are not.

    Raises:
        DataError: nothing is there, or nibabel is missing.
    """
    _nibabel()

    def slices_of(listed: Listed, problems: list[Problem]) -> list[Item]:
        del problems  # a volume is whole or not used
        return _slices_of(listed, config.axis)

    return scan_files(config.data, "NIfTI", _is_nifti, slices_of)


def _nibabel() -> ModuleType:
    try:
        import nibabel
    except ImportError as error:
        raise DataError("NIfTI files are read by nibabel: pip install 'ldmkit[medical]'") from error
    return nibabel


def _is_nifti(file: Listed) -> bool:
    return file.name.lower().endswith((".nii", ".nii.gz"))


def _is_zipped(path: str) -> bool:
    return path.lower().endswith(".gz")


def _slices_of(listed: Listed, axis: int) -> list[Item]:
    with named_if_damaged(listed.path, "NIfTI"):
        volume = _volume(listed)
    sides = [side for place, side in enumerate(volume.shape) if place != axis]
    require_size(sides, listed.path)
    count = volume.shape[axis]
    if count * volume.times > MAX_PICTURES:
        raise DataError(f"{listed.path} has {count * volume.times:,} slices, which are too many")
    word = "slice" if axis == AXIAL else f"axis{axis}"  # a set's keys tell how it was cut
    subject = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)", listed.name)
    group = subject.group(1) if subject else re.sub(r"\.nii(\.gz)?$", "", listed.name, flags=re.I)
    return [
        Item(
            f"{listed.name}#{word}-{index:03d}" + (f"-time-{time:04d}" if volume.times > 1 else ""),
            NiftiSlice(volume, axis, index, time),
            group=group,
        )
        for time in range(volume.times)
        for index in range(count)
    ]


def _volume(listed: Listed) -> Volume:
    """What the header says, checked against what the file can hold."""
    path = listed.path
    image, voxels_at = _open(path)
    shape = tuple(int(side) for side in image.shape)
    dtype = image.get_data_dtype()
    coloured = dtype.names == ("R", "G", "B")
    if len(shape) < 2 or set(shape[4 if coloured else 5 :]) - {1} or min(shape) < 1:
        raise DataError(f"{path} has the shape {list(shape)}; volumes of 2 to 5 axes are read")
    if dtype.kind not in "iuf" and not coloured:
        raise DataError(f"{path} has voxels of type {dtype}, which are not read; save numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    limit = listed.size * INFLATED_AT_MOST if _is_zipped(path) else listed.size
    if voxels_at + nbytes > limit:
        raise DataError(f"{path} is cut off: {nbytes:,} bytes of voxels do not lie in it")
    if _is_zipped(path) and nbytes > HELD_BYTES:
        raise DataError(
            f"{path} inflates to {nbytes:,} bytes; gunzip it, and it is read by position"
        )
    axes = [int(axis) for axis in np.argsort(_orientation(image, path)[:, 0])]
    sides = (*shape, 1, 1)
    return Volume(
        path,
        listed.size,
        (sides[axes[0]], sides[axes[1]], sides[axes[2]]),
        sides[3],
        nbytes,
        float(image.dataobj.slope),
        float(image.dataobj.inter),
    )


def _open(path: str) -> tuple[Any, int]:
    """The image of nibabel, its voxels not yet read, and where they begin."""
    voxels_at = _voxels_at(path)
    nibabel = _nibabel()
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is one too
        raise DataError(f"{path} is no NIfTI file")
    return image, voxels_at


def _voxels_at(path: str) -> int:
    """Where the voxels begin; a header of a wrong size or with huge extensions is refused."""
    with gzip.open(path) if _is_zipped(path) else Path(path).open("rb") as file:
        head = file.read(176)
    for order in "<>":
        if head[:4] == struct.pack(f"{order}i", 348) and len(head) == 176:
            place = struct.unpack_from(f"{order}f", head, 108)[0]
        elif head[:4] == struct.pack(f"{order}i", 540) and len(head) == 176:
            place = struct.unpack_from(f"{order}q", head, 168)[0]
        else:
            continue
        if not 0 <= place <= MAX_HEADER:
            raise DataError(f"{path} is a damaged NIfTI file (its voxels begin at byte {place:g})")
        return int(place)
    raise DataError(f"{path} is no NIfTI file")


def _orientation(image: Any, path: str) -> np.ndarray:  # noqa: ANN401
    """For each axis of the file: its axis in RAS, and 1 or -1 where it runs the other way."""
    affine = np.asarray(image.affine)
    order = np.full((3, 2), np.nan)
    if np.isfinite(affine).all():
        order = _nibabel().io_orientation(affine)
    if not np.isfinite(order).all():
        raise DataError(f"{path} does not say how its axes lie (its affine is singular)")
    return order


def _turned(path: str) -> np.ndarray:
    """Stored voxels `[right, anterior, superior, time, channel]`: a view of the file, or inflated."""
    image, _ = _open(path)
    stored = np.asanyarray(image.dataobj.get_unscaled())
    stored = stored.reshape((*stored.shape, 1, 1, 1)[:5], order="F")
    if stored.dtype.names:
        stored = np.concatenate([stored[colour] for colour in stored.dtype.names], axis=4)
    return _nibabel().apply_orientation(stored, _orientation(image, path))
