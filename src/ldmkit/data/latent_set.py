"""Reading a committed latent set: any samples in any order, at the speed of memory.

Shards are mapped into memory as they lie on disk. A batch is put together by copying one piece of
memory for each sample, in the number format it is stored in; whoever computes converts to float32
on the device, which is exact. A thread hashes the shards meanwhile, so that a large set does not
delay the start; nothing that was learnt may be written before it is through
(`LatentSet.wait_until_verified`).
"""

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldmkit.container import Header, read_header
from ldmkit.data.items import NO_LABEL
from ldmkit.data.order import is_held_back
from ldmkit.errors import DataError, StorageError
from ldmkit.facts import Manifest, ShardEntry
from ldmkit.manifest import read_manifest, verify_shard
from ldmkit.tensors import Latents

LATENT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
Shape = tuple[int, int, int]
"""z, height, width of a latent."""
Value = TypeVar("Value")


class LatentBatch(NamedTuple):
    """Posteriors of a batch."""

    mean: Latents
    """In the number format of the set: float16, bfloat16 or float32."""
    std: Latents
    """Zero where the bottleneck has no noise."""


class LatentSet:
    """A committed latent set, memory-mapped for random access.

    Names, sizes and headers of the shards are checked at once. Their digests are checked by a thread
    that lives as long as this object or until it is through; what it finds is raised by the next
    `read` and by `wait_until_verified`.

    Args:
        directory: of the set.

    Raises:
        DataError: the set is unfinished, or a shard is missing, of another size or not what the
            manifest says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        entries = self.manifest.shards
        self._starts = np.cumsum([0, *(entry.count for entry in entries)])
        if not 0 < len(self) == self.manifest.count:
            raise DataError(f"the manifest of {directory} counts wrong; run `ldmkit encode` again")
        self._shards = [_open_shard(directory, entry, self.manifest) for entry in entries]
        self._dtype = _only([shard.dtype for shard in self._shards], directory, "number format")
        self._noisy = _only([shard.std is not None for shard in self._shards], directory, "std")
        self._mean = np.array([shard.mean for shard in self._shards])
        self._std = np.array([shard.std or 0 for shard in self._shards])
        self._shapes = list(dict.fromkeys(shard.shape for shard in self._shards))
        self._kinds = np.array([self._shapes.index(shard.shape) for shard in self._shards])
        self.labels = np.concatenate([shard.column("label", np.int64) for shard in self._shards])
        self._require_known_labels(directory)
        self._verification = _Verification(directory, entries)
        weakref.finalize(self, self._verification.stop)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shapes(self) -> dict[Shape, np.ndarray]:
        """Every shape of latents in the set, with the sorted indices of its samples (int64)."""
        spans = [np.arange(*pair) for pair in itertools.pairwise(self._starts)]
        return {
            shape: np.concatenate([spans[i] for i in np.flatnonzero(self._kinds == kind)])
            for kind, shape in enumerate(self._shapes)
        }

    @property
    def has_labels(self) -> bool:
        """Whether any sample carries a class."""
        return bool((self.labels != NO_LABEL).any())

    def read(self, indices: Sequence[int] | np.ndarray) -> LatentBatch:
        """The posteriors of some samples (at least one), as they are stored, in the order asked for.

        Raises:
            IndexError: there is no such sample.
            ValueError: the samples are of several shapes, or none is asked for.
            DataError: a shard has meanwhile been found damaged.
        """
        self._verification.raise_error()
        wanted = np.asarray(indices, dtype=np.int64)
        if not wanted.size:
            raise ValueError("no sample is asked for")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"samples 0 to {len(self) - 1} are there, not all of {wanted}")
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        kinds = self._kinds[owners]
        if (kinds != kinds[0]).any():
            raise ValueError("a batch has latents of one shape; see LatentSet.shapes")
        rows = wanted - self._starts[owners]
        shape = self._shapes[kinds[0]]
        mean = self._gather(self._mean, owners, rows, shape)
        std = torch.zeros((), dtype=mean.dtype).expand_as(mean)
        if self._noisy:
            std = self._gather(self._std, owners, rows, shape)
        return LatentBatch(mean, std)

    def texts(self, name: str) -> Iterator[str]:
        """A text column (`key` or `caption`), from the first sample to the last.

        Raises:
            DataError: the column is not there, or is damaged.
        """
        for shard in self._shards:
            yield from shard.texts(name)

    def training_indices(self, share: float) -> np.ndarray:
        """The samples that are not held back from training, in order, int64; see `is_held_back`.

        Raises:
            DataError: there are none.
        """
        if share == 0:  # a million keys need not be read then
            return np.arange(len(self))
        names = zip(self.texts("key"), self.texts("group"), strict=True)
        kept = (not is_held_back(group or key, share) for key, group in names)
        indices = np.flatnonzero(np.fromiter(kept, dtype=bool, count=len(self)))
        if not len(indices):
            raise DataError(f"--holdout {share} leaves none of the {len(self)} latents to train on")
        return indices

    def in_turns(self, indices: np.ndarray) -> np.ndarray:
        """These samples in such an order that the classes take turns."""
        labels = self.labels[indices]
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], labels[order], side="left")
        rank = np.empty(len(indices), dtype=np.int64)
        rank[order] = np.arange(len(indices)) - starts
        return indices[np.lexsort((labels, rank))]

    def wait_until_verified(self) -> None:
        """Return when the bytes of every shard are known to be those of the manifest.

        Raises:
            DataError: a shard is damaged.
            StorageError: a shard cannot be read.
        """
        self._verification.wait()

    def _gather(
        self, starts: np.ndarray, owners: np.ndarray, rows: np.ndarray, shape: Shape
    ) -> Tensor:
        """One tensor from rows of several shards whose column begins at these offsets."""
        length = int(np.prod(shape)) * self._dtype.itemsize
        begins = (starts[owners] + rows * length).tolist()
        shards = self._shards
        pieces = [
            shards[owner].file[begin : begin + length]
            for owner, begin in zip(owners.tolist(), begins, strict=True)
        ]
        data = bytearray().join(pieces)  # one copy for each sample, straight from the page cache
        return torch.frombuffer(data, dtype=self._dtype).view(len(rows), *shape)

    def _require_known_labels(self, directory: Path) -> None:
        # before the digests are known: a wrong index would stop training with an error of its own
        known = len(self.manifest.class_names)
        if known and (self.labels.min() < NO_LABEL or self.labels.max() >= known):
            raise DataError(
                f"{directory} is damaged (labels beyond its {known} classes); run `ldmkit encode` again"
            )


class _Shard(NamedTuple):
    """A shard in memory, as far as it is touched."""

    path: Path
    file: memoryview
    """The whole file, read-only."""
    header: Header
    dtype: torch.dtype
    shape: Shape
    mean: int
    """Where the column begins, bytes from the start of the file."""
    std: int | None

    def column(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """A column as it lies in the file."""
        entry = self.header.tensors.get(name)
        if entry is None or entry.stop - entry.start != np.dtype(dtype).itemsize * int(
            np.prod(entry.shape)
        ):
            raise DataError(f"{self.path} has no column {name} that can be read")
        start = self.header.payload_start
        return np.frombuffer(self.file[start + entry.start : start + entry.stop], dtype)

    def texts(self, name: str) -> Iterator[str]:
        data = self.column(f"{name}.bytes", np.uint8).tobytes()
        offsets = self.column(f"{name}.offsets", np.int64).tolist()
        try:
            for start, stop in itertools.pairwise(offsets):
                yield data[start:stop].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is damaged; run `ldmkit encode` again") from error


def _open_shard(directory: Path, entry: ShardEntry, manifest: Manifest) -> _Shard:
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
    start = header.payload_start
    return _Shard(
        path=path,
        file=_memory_map(path, size),
        header=header,
        dtype=LATENT_DTYPES[mean.dtype],
        shape=shape,
        mean=start + mean.start,
        std=None if std is None else start + std.start,
    )


def _memory_map(path: Path, size: int) -> memoryview:
    # np.memmap and mmap would keep a file open for each map: a thousand shards exceed the usual limit
    try:
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise StorageError(f"cannot map {path} into memory: {error}") from error
    mapped.flags.writeable = False
    return mapped.data


def _only(values: Sequence[Value], directory: Path, what: str) -> Value:
    if len(set(values)) != 1:
        raise DataError(f"the shards of {directory} differ in {what}; run `ldmkit encode` again")
    return values[0]


class _Verification:
    """A thread that hashes all shards once."""

    def __init__(self, directory: Path, entries: Sequence[ShardEntry]) -> None:
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(directory, entries), daemon=True)
        self._thread.start()

    def _run(self, directory: Path, entries: Sequence[ShardEntry]) -> None:
        try:
            for entry in entries:
                if self._stopped.is_set():
                    return
                verify_shard(directory, entry)
        except OSError as error:
            self._error = StorageError(f"cannot read {directory}: {error.strerror}")
        except Exception as error:  # raised where the latents are used, whatever it is
            self._error = error

    def stop(self) -> None:
        """Nobody waits any more."""
        self._stopped.set()

    def raise_error(self) -> None:
        """Raise what was found so far."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Raise what is found in the end."""
        self._thread.join()
        self.raise_error()
