"""One shard of a latent set as it lies on disk, mapped into memory, its header checked beforehand.

`data.latents` says which columns there are and what they hold.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldmkit.container import Header, TensorEntry, read_header
from ldmkit.errors import DataError, StorageError
from ldmkit.facts import Manifest, ShardEntry

DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
}
LATENT_DTYPES = ("F16", "BF16", "F32")
TEXTS = ("key", "caption", "group")
BOXES = "boxes"
EMPTY_TEXT = "text.empty"
OFFSET_BYTES = 8


class Form(NamedTuple):
    """What a column must look like whose samples are all of one shape."""

    dtypes: tuple[str, ...]
    """Number formats it may have, as safetensors calls them."""
    axes: int
    """With the first, over samples."""


FORMS = {
    "mean": Form(LATENT_DTYPES, 4),
    "std": Form(LATENT_DTYPES, 4),
    "label": Form(("I64",), 1),
    "view": Form(("I64",), 1),
    "labels": Form(("I64",), 2),
    "labelmap": Form(("U8",), 3),
    "mask": Form(("U8",), 3),
    "lowres": Form(("U8", "F32"), 4),
    "scalars": Form(("F32",), 2),
    "text": Form(("F16",), 3),
    "hole": Form(("U8",), 3),
    "masked": Form(LATENT_DTYPES, 4),
    "image": Form(("U8",), 4),
    "image_embedding": Form(("F16",), 3),
}
"""Column -> form. The others are texts and boxes."""


class Column(NamedTuple):
    """Where such a column lies in one shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of one sample."""
    start: int
    """Bytes from the start of the file."""


class Shard(NamedTuple):
    """A shard in memory, as far as it is touched."""

    path: Path
    file: memoryview
    """The whole file, read-only."""
    header: Header
    columns: dict[str, Column]
    """Those of one shape; all that the manifest names, but in a shard without samples."""

    def array(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """A tensor as it lies in the file, flat.

        Raises:
            DataError: it is not there.
        """
        entry = self.header.tensors.get(name)
        if entry is None or entry.stop - entry.start != np.dtype(dtype).itemsize * int(
            np.prod(entry.shape)
        ):
            raise DataError(f"{self.path} has no column {name} that can be read")
        start = self.header.payload_start
        return np.frombuffer(self.file[start + entry.start : start + entry.stop], dtype)

    def texts(self, name: str) -> Iterator[str]:
        """A text column.

        Raises:
            DataError: it is not there, or damaged.
        """
        data = self.array(f"{name}.bytes", np.uint8).tobytes()
        offsets = self.array(f"{name}.offsets", np.int64).tolist()
        for start, stop in itertools.pairwise(offsets):
            yield self._decoded(data[start:stop])

    def text(self, name: str, row: int) -> str:
        """One text of a column that is there.

        Raises:
            DataError: it is damaged.
        """
        entry = self.header.tensors[f"{name}.bytes"]
        start, stop = self._span(name, row, entry.shape[0])
        first = self.header.payload_start + entry.start
        return self._decoded(bytes(self.file[first + start : first + stop]))

    def boxes(self, row: int) -> np.ndarray:
        """The boxes of one sample, `[m, 5]` float32, where the column is there.

        Raises:
            DataError: it is damaged.
        """
        entry = self.header.tensors[f"{BOXES}.values"]
        start, stop = self._span(BOXES, row, entry.shape[0])
        width = 5 * np.dtype(np.float32).itemsize
        first = self.header.payload_start + entry.start
        piece = bytes(self.file[first + start * width : first + stop * width])
        return np.frombuffer(piece, np.float32).reshape(-1, 5).copy()

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, copied.

        Raises:
            DataError: it is not there.
        """
        entry = self.header.tensors.get(name)
        if entry is None or entry.dtype not in DTYPES:
            raise DataError(f"{self.path} has no column {name} that can be read")
        start = self.header.payload_start
        data = bytearray(self.file[start + entry.start : start + entry.stop])
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)

    def _span(self, name: str, row: int, length: int) -> tuple[int, int]:
        """Where a row of a ragged column begins and ends."""
        first = self.header.payload_start + self.header.tensors[f"{name}.offsets"].start
        place = first + row * OFFSET_BYTES
        start, stop = np.frombuffer(self.file[place : place + 2 * OFFSET_BYTES], np.int64).tolist()
        if not 0 <= start <= stop <= length:
            raise DataError(f"{self.path} is damaged (column {name}); run `ldmkit encode` again")
        return start, stop

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is damaged; run `ldmkit encode` again") from error


def open_shard(directory: Path, entry: ShardEntry, manifest: Manifest) -> Shard:
    """Map a shard into memory and check its header.

    Raises:
        DataError: it is missing, of another size, or a column is not what the manifest says.
        StorageError: it cannot be mapped.
    """
    path = directory / entry.name
    if not path.is_file():
        raise DataError(f"{path} is missing; run `ldmkit encode` again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise DataError(
            f"{path} is damaged ({size} bytes, {entry.bytes} in the manifest); "
            "run `ldmkit encode` again"
        )
    header = read_header(path)
    shape = entry.shape or manifest.latent_shape
    mean, std = header.tensors.get("mean"), header.tensors.get("std")
    label = header.tensors.get("label")
    if (
        mean is None
        or mean.dtype not in LATENT_DTYPES
        or mean.shape != (entry.count, *shape)
        or (std is not None and std[:2] != mean[:2])
        or (label is None or label[:2] != ("I64", (entry.count,)))
    ):
        raise DataError(f"{path} does not hold what the manifest says; run `ldmkit encode` again")
    for name in manifest.columns if entry.count else ():
        if not _is_whole(name, header.tensors, entry.count, manifest):
            raise DataError(
                f"{path} has no column {name} that can be read, and the manifest says it has; run "
                "`ldmkit encode` again"
            )
    columns = {
        name: Column(DTYPES[found.dtype], found.shape[1:], header.payload_start + found.start)
        for name, found in header.tensors.items()
        if name in ("mean", "std", "label") or (name in FORMS and name in manifest.columns)
    }
    return Shard(path, _memory_map(path, size), header, columns)


def _is_whole(name: str, tensors: dict[str, TensorEntry], count: int, manifest: Manifest) -> bool:
    """Whether a column has the shape and number format it must have, by the header alone."""
    if name in TEXTS or name == BOXES:
        values = tensors.get(f"{name}.values" if name == BOXES else f"{name}.bytes")
        offsets = tensors.get(f"{name}.offsets")
        if values is None or offsets is None or offsets[:2] != ("I64", (count + 1,)):
            return False
        if name == BOXES:
            return values.dtype == "F32" and values.shape[1:] == (5,)
        return values.dtype == "U8" and len(values.shape) == 1
    form, found = FORMS.get(name), tensors.get(name)
    if form is None:  # of a later version, which nobody here asks for
        return True
    if found is None or found.dtype not in form.dtypes or len(found.shape) != form.axes:
        return False
    expected = {
        "labels": (len(manifest.label_sets),),
        "scalars": (len(manifest.scalar_names),),
        "masked": tensors["mean"].shape[1:],
    }.get(name, found.shape[1:])
    empty = tensors.get(EMPTY_TEXT)
    if name == "text" and (empty is None or empty[:2] != (found.dtype, found.shape[1:])):
        return False
    return found.shape == (count, *expected)


def _memory_map(path: Path, size: int) -> memoryview:
    # np.memmap and mmap would keep a file open for each map: a thousand shards exceed the usual limit
    try:
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise StorageError(f"cannot map {path} into memory: {error}") from error
    mapped.flags.writeable = False
    return mapped.data
