"""Reading a committed latent set: any samples in any order, at the speed of memory.

Shards are mapped into memory as they lie on disk. A batch is put together by copying one piece of
memory for each sample, in the number format it is stored in; whoever computes converts to float32
on the device, which is exact. A thread hashes the shards meanwhile, so that a large set does not
delay the start; nothing that was learnt may be written before it is through
(`LatentSet.wait_until_verified`).
"""

import itertools
import math
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldmkit.data.items import NO_LABEL
from ldmkit.data.order import is_held_back
from ldmkit.data.shard_file import BOXES, EMPTY_TEXT, TEXTS, Shard, open_shard
from ldmkit.errors import DataError, StorageError
from ldmkit.facts import ShardEntry
from ldmkit.manifest import read_manifest, verify_shard
from ldmkit.tensors import Latents

Shape = tuple[int, int, int]
"""z, height, width of a latent."""
Value = TypeVar("Value")
OFFSETS = f"{BOXES}.offsets"


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
        verify: check the digests; where several processes read one set, one does.

    Raises:
        DataError: the set is unfinished, or a shard is missing, of another size or not what the
            manifest says.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        entries = self.manifest.shards
        self._starts = np.cumsum([0, *(entry.count for entry in entries)])
        if not 0 < len(self) == self.manifest.count:
            raise DataError(f"the manifest of {directory} counts wrong; run `ldmkit encode` again")
        self._shards = [open_shard(directory, entry, self.manifest) for entry in entries]
        _only(["std" in shard.columns for shard in self._shards], directory, "std")
        names = dict.fromkeys(name for shard in self._shards for name in shard.columns)
        self._columns = {name: _column_over(self._shards, name, directory) for name in names}
        self.labels = np.concatenate([shard.array("label", np.int64) for shard in self._shards])
        self.labels_of_sets = self._read_label_sets()
        self._require_known_labels(directory)
        self._verification = _Verification(directory, entries if verify else [])
        weakref.finalize(self, self._verification.stop)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shapes(self) -> dict[Shape, np.ndarray]:
        """Every shape of latents in the set, with the sorted indices of its samples (int64)."""
        spans = [np.arange(*pair) for pair in itertools.pairwise(self._starts)]
        mean = self._columns["mean"]
        return {
            (z, height, width): np.concatenate(
                [spans[i] for i in np.flatnonzero(mean.kinds == kind)]
            )
            for kind, (z, height, width) in enumerate(mean.shapes)
        }

    @property
    def has_labels(self) -> bool:
        """Whether any sample carries a class, in any label set."""
        return bool((self.labels_of_sets != NO_LABEL).any())

    def read(self, indices: Sequence[int] | np.ndarray) -> LatentBatch:
        """The posteriors of some samples (at least one), as they are stored, in the order asked for.

        Raises:
            IndexError: there is no such sample.
            ValueError: the samples are of several shapes, or none is asked for.
            DataError: a shard has meanwhile been found damaged.
        """
        places = self._places(indices)
        mean = self._gather("mean", *places)
        if "std" in self._columns:
            return LatentBatch(mean, self._gather("std", *places))
        return LatentBatch(mean, torch.zeros((), dtype=mean.dtype).expand_as(mean))

    def rows(self, name: str, indices: Sequence[int] | np.ndarray) -> Tensor:
        """A column of some samples (at least one), as it is stored, in the order asked for.

        Args:
            name: of a column whose samples each have one shape: mean, std, label, labels, view, labelmap,
                mask, lowres, scalars, text, hole, masked, image or image_embedding.
            indices: of the samples.

        Returns:
            `[len(indices), ...]`, uint8, int64, float16, bfloat16 or float32.

        Raises:
            DataError: the set has no such column, or a shard has meanwhile been found damaged.
            IndexError: there is no such sample.
            ValueError: the samples are of several shapes, or none is asked for.
        """
        self._require_column(name, self._columns)
        return self._gather(name, *self._places(indices))

    def text(self, name: str, index: int) -> str:
        """One text of a column (`key`, `caption` or `group`); no other is read.

        Raises:
            DataError: the set has no such column, or it is damaged.
            IndexError: there is no such sample.
        """
        self._require_column(name, [c for c in self.manifest.columns if c in TEXTS])
        owners, rows = self._places([index])
        return self._shards[int(owners[0])].text(name, int(rows[0]))

    def boxes(self, index: int) -> np.ndarray:
        """The boxes of one sample, `[m, 5]` float32: category, x0, y0, x1, y1 in shares of the picture.

        Raises:
            DataError: the set has no boxes, or they are damaged.
            IndexError: there is no such sample.
        """
        self._require_column(BOXES, self.manifest.columns)
        owners, rows = self._places([index])
        return self._shards[int(owners[0])].boxes(int(rows[0]))

    def box_counts(self) -> np.ndarray:
        """How many boxes each sample has, int64; the boxes themselves are not read.

        Raises:
            DataError: the set has no boxes.
        """
        self._require_column(BOXES, self.manifest.columns)
        there = [shard for shard in self._shards if OFFSETS in shard.header.tensors]
        return np.concatenate([np.diff(shard.array(OFFSETS, np.int64)) for shard in there])

    def empty_text(self) -> Tensor:
        """The embedding of the empty text, `[t, w]` float16, by the encoder of the column `text`.

        Raises:
            DataError: the set has no such column.
        """
        self._require_column("text", self._columns)
        first = next(shard for shard in self._shards if "text" in shard.columns)
        return first.tensor(EMPTY_TEXT)

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

    def _require_column(self, name: str, known: Collection[str]) -> None:
        if name not in known:
            raise DataError(
                f"{self.directory} has no column {name}; its columns are "
                f"{', '.join(self.manifest.columns)}"
            )

    def _places(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each sample, and its row there."""
        self._verification.raise_error()
        wanted = np.asarray(indices, dtype=np.int64)
        if not wanted.size:
            raise ValueError("no sample is asked for")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"samples 0 to {len(self) - 1} are there, not all of {wanted}")
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        return owners, wanted - self._starts[owners]

    def _gather(self, name: str, owners: np.ndarray, rows: np.ndarray) -> Tensor:
        """One tensor from rows of several shards."""
        column = self._columns[name]
        shape = column.shapes[column.kinds[owners[0]]]
        if len(column.shapes) > 1 and (column.kinds[owners] != column.kinds[owners[0]]).any():
            raise ValueError(f"a batch has {name} of one shape; see LatentSet.shapes")
        length = math.prod(shape) * column.dtype.itemsize
        begins = (column.begins[owners] + rows * length).tolist()
        shards = self._shards
        pieces = [
            shards[owner].file[begin : begin + length]
            for owner, begin in zip(owners.tolist(), begins, strict=True)
        ]
        data = bytearray().join(pieces)  # one copy for each sample, straight from the page cache
        return torch.frombuffer(data, dtype=column.dtype).view(len(rows), *shape)

    def _read_label_sets(self) -> np.ndarray:
        """Class indices `[samples, sets]`, int64; of the one set where there are no others."""
        sets = len(self.manifest.label_sets)
        if not sets:
            return self.labels[:, None]
        there = [shard for shard in self._shards if "labels" in shard.columns]
        return np.concatenate([s.array("labels", np.int64).reshape(-1, sets) for s in there])

    def _require_known_labels(self, directory: Path) -> None:
        # before the digests are known: a wrong index would stop training with an error of its own
        sets = [one.classes for one in self.manifest.label_sets] or [self.manifest.class_names]
        for names, labels in zip(sets, self.labels_of_sets.T, strict=True):
            known = len(names)
            if known and (labels.min() < NO_LABEL or labels.max() >= known):
                raise DataError(
                    f"{directory} is damaged (labels beyond its {known} classes); run `ldmkit encode` "
                    "again"
                )


class _Column(NamedTuple):
    """A column of samples that each have one shape, over all shards."""

    dtype: torch.dtype
    shapes: list[tuple[int, ...]]
    """All that occur."""
    kinds: np.ndarray
    """Of each shard: which of the shapes."""
    begins: np.ndarray
    """Of each shard: where the column begins, bytes from the start of the file."""


def _column_over(shards: Sequence[Shard], name: str, directory: Path) -> _Column:
    there = [shard.columns[name] for shard in shards if name in shard.columns]
    dtype = _only([column.dtype for column in there], directory, f"number format of {name}")
    absent = there[0]._replace(start=0)  # in a shard without samples, where nobody reads
    columns = [shard.columns.get(name, absent) for shard in shards]
    shapes = list(dict.fromkeys(column.shape for column in columns))
    kinds = np.array([shapes.index(column.shape) for column in columns])
    return _Column(dtype, shapes, kinds, np.array([column.start for column in columns]))


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
