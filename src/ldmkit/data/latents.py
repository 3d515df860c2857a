"""The latent set: a directory of safetensors shards and the manifest that commits it.

Shard k holds the source items of one fixed range, whatever process writes it, so its bytes depend on
nothing but the recipe: autoencoder, preprocessing, number format, items. Tensors of a shard share
their first dimension N:

    mean, std     [N, z, h, w]   of the posterior, in the autoencoder's own (raw) space; std is
                                 absent where the bottleneck has no noise
    label         [N]            class index, -1 where there is none
    key, caption                 text, as NAME.bytes (uint8) and NAME.offsets ([N + 1])

`manifest.json` comes last and names every shard with its size and sha256. A set without it is
unfinished and is refused.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldmkit.container import FORMAT_VERSIONS, read_header
from ldmkit.data.sources import NO_LABEL, Item
from ldmkit.errors import DataError
from ldmkit.facts import Facts, Manifest, ShardEntry, ShardFacts, Whitening, validated
from ldmkit.manifest import read_manifest, verify_shard
from ldmkit.modelfile import versions
from ldmkit.tensors import Labels, Latents

STORED_DTYPES = {"float16": torch.float16, "float32": torch.float32}
NUMPY_DTYPES = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}


class LatentBatch(NamedTuple):
    """Posteriors and labels of a batch."""

    mean: Latents
    std: Latents
    """Zero where the bottleneck has no noise."""
    label: Labels


def items_digest(items: Sequence[Item]) -> str:
    """sha256 over keys, labels, captions, masks (whether there): changes with what the data set holds."""
    digest = hashlib.sha256()
    for item in items:
        masked = ["mask"] if item.mask else []
        digest.update(json.dumps([item.key, item.label, item.caption, *masked]).encode())
    return digest.hexdigest()


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"{number:05d}.safetensors"


def shard_tensors(mean: Latents, std: Latents | None, items: Sequence[Item]) -> dict[str, Tensor]:
    """The tensors of one shard, as they are stored; `std` is None for a bottleneck without noise.

    Raises:
        DataError: a latent is not finite in the number format asked for.
    """
    moments = {"mean": mean} if std is None else {"mean": mean, "std": std}
    finite = torch.stack([x.isfinite().flatten(1).all(1) for x in moments.values()]).all(0)
    if not bool(finite.all()):
        first = items[int(finite.int().argmin())].key
        raise DataError(
            f"the latents of {first} are not finite as {mean.dtype}; try --dtype float32"
        )
    return {
        **moments,
        "label": torch.tensor([item.label for item in items], dtype=torch.int64),
        **_ragged("key", [item.key for item in items]),
        **_ragged("caption", [item.caption for item in items]),
    }


def moments_of(
    mean: Latents, std: Latents | None
) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """Values per channel, their sum, and the sum of their expected squares, for the whitening."""
    mean = mean.double()
    axes = (0, 2, 3)
    count = float(mean.shape[0] * mean.shape[2] * mean.shape[3])
    squares = mean.square().sum(axes)
    if std is not None:
        squares = squares + std.double().square().sum(axes)
    return count, tuple(mean.sum(axes).tolist()), tuple(squares.tolist())


def build_manifest(
    recipe: Facts,
    class_names: tuple[str, ...],
    latent_shape: tuple[int, int, int],
    shards: Sequence[tuple[ShardEntry, ShardFacts]],
    *,
    noisy: bool,
) -> Manifest:
    """Sum up the shards of a set, in order; `noisy` latents have a `std` column.

    Raises:
        DataError: the set is empty.
    """
    count = sum(entry.count for entry, _ in shards)
    if count == 0:
        raise DataError("not one picture could be encoded")
    values = sum(facts.moments[0] for _, facts in shards)
    mean = np.sum([facts.moments[1] for _, facts in shards], axis=0) / values
    square = np.sum([facts.moments[2] for _, facts in shards], axis=0) / values
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return Manifest(
        format=f"ldmkit.latents/{FORMAT_VERSIONS['latents']}",
        recipe=recipe,
        count=count,
        latent_shape=latent_shape,
        columns=("mean", *(["std"] if noisy else []), "key", "label", "caption"),
        class_names=class_names,
        whitening=Whitening(mean=tuple(mean.tolist()), std=tuple(std.tolist())),
        shards=tuple(entry for entry, _ in shards),
        skipped=tuple(pair for _, facts in shards for pair in facts.skipped),
        versions=versions(),
    )


class LatentSet:
    """A committed latent set, memory-mapped for random access.

    Args:
        directory: of the set. Every shard is checked against its digest first.

    Raises:
        DataError: the set is unfinished, or a shard is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.manifest = read_manifest(directory)
        self._shards: list[dict[str, np.ndarray]] = []
        for entry in self.manifest.shards:
            verify_shard(directory, entry)
            self._shards.append(_memory_map(directory / entry.name))
        self._starts = np.cumsum([0, *(len(shard["label"]) for shard in self._shards)])
        self.labels = np.concatenate([shard["label"] for shard in self._shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Sequence[int]) -> LatentBatch:
        """The posteriors of some samples, as float32, in the order asked for."""
        wanted = np.asarray(indices, dtype=np.int64)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        shape = (len(wanted), *self.manifest.latent_shape)
        mean, std = np.empty(shape, np.float32), np.zeros(shape, np.float32)
        for owner in np.unique(owners):
            rows = np.flatnonzero(owners == owner)
            local = wanted[rows] - self._starts[owner]
            mean[rows] = self._shards[owner]["mean"][local]
            if "std" in self._shards[owner]:
                std[rows] = self._shards[owner]["std"][local]
        labels = torch.from_numpy(self.labels[wanted])
        return LatentBatch(torch.from_numpy(mean), torch.from_numpy(std), labels)

    def texts(self, name: str) -> list[str]:
        """A text column (`key` or `caption`) whole."""
        return [text for shard in self._shards for text in _unragged(shard, name)]

    @property
    def has_labels(self) -> bool:
        """Whether any sample carries a class."""
        return bool((self.labels != NO_LABEL).any())


def _ragged(name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.cumsum([0, *(len(text) for text in encoded)])
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {f"{name}.bytes": torch.from_numpy(data), f"{name}.offsets": torch.from_numpy(offsets)}


def _unragged(shard: dict[str, np.ndarray], name: str) -> list[str]:
    data, offsets = shard[f"{name}.bytes"].tobytes(), shard[f"{name}.offsets"]
    pairs = itertools.pairwise(offsets)
    return [data[start:stop].decode("utf-8", "surrogatepass") for start, stop in pairs]


def _memory_map(path: Path) -> dict[str, np.ndarray]:
    header = read_header(path)
    validated(ShardFacts, header.facts, str(path))
    arrays = {}
    for name, entry in header.tensors.items():
        dtype = NUMPY_DTYPES.get(entry.dtype)
        if dtype is None:
            raise DataError(f"{path}: tensor {name} has the number format {entry.dtype}")
        if entry.start == entry.stop:  # an empty map is no map
            arrays[name] = np.empty(entry.shape, dtype)
            continue
        start = header.payload_start + entry.start
        arrays[name] = np.memmap(path, dtype, mode="r", offset=start, shape=entry.shape)
    return arrays
