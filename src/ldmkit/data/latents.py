"""The latent set: a directory of safetensors shards and the manifest that commits it.

Shard k holds the source items of one fixed range, whatever process writes it, so its bytes depend on
nothing but the recipe: autoencoder, preprocessing, number format, items. Tensors of a shard share
their first dimension N:

    mean, std     [N, z, h, w]   of the posterior, in the autoencoder's own (raw) space; std is
                                 absent where the bottleneck has no noise
    label         [N]            class index, -1 where there is none
    view          [N]            0 = the plain view of its picture, 1 ... = further ones
    key, caption, group          text, as NAME.bytes (uint8) and NAME.offsets ([N + 1])

and, where the source has them or they were asked for:

    boxes                        category, x0, y0, x1, y1 in shares of the picture, as boxes.values
                                 ([M, 5]) and boxes.offsets ([N + 1])
    labelmap      [N, H, W]      classes of the pixels, uint8
    mask          [N, H, W]      1 = the pixel counts, uint8
    lowres        [N, c, h, w]   the picture made smaller, uint8 or float32 in [-1, 1]
    labels        [N, k]         class index in each of several label sets (`Manifest.label_sets`), -1 where
                                 there is none; the first is `label`
    scalars       [N, n]         numbers by name (`Manifest.scalar_names`), float32, NaN = not known
    text          [N, t, w]      embedding of the first line of the caption, float16, and
                                 text.empty ([t, w]), that of the empty text
    hole          [N, H, W]      1 = to be painted in, uint8
    masked        [N, z, h, w]   mean of the posterior of the picture whose hole is filled
    image         [N, C, H, W]   the picture itself, uint8
    image_embedding [N, t, w]    embedding of the picture as it was encoded, float16

`manifest.json` comes last and names every shard with its size and sha256. A set without it is
unfinished and is refused.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ldmkit.container import FORMAT_VERSIONS
from ldmkit.data.items import Box, Item, Source
from ldmkit.data.tally import joined
from ldmkit.errors import DataError
from ldmkit.facts import Facts, Manifest, ShardEntry, ShardFacts, Whitening
from ldmkit.modelfile import versions
from ldmkit.tensors import Latents

IMAGE_EMBEDDING = "image_embedding"
COLUMNS = (
    "mean",
    "std",
    "key",
    "label",
    "caption",
    "group",
    "view",
    "boxes",
    "labelmap",
    "mask",
    "lowres",
    "labels",
    "scalars",
    "text",
    "hole",
    "image",
    "masked",
    IMAGE_EMBEDDING,
)
STORED_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class Row(NamedTuple):
    """What a latent was made from."""

    item: Item
    view: int
    """0 = the plain one."""
    boxes: tuple[Box, ...]


class WrittenShard(NamedTuple):
    """A shard as the manifest will name it, and what it says of itself."""

    entry: ShardEntry
    facts: ShardFacts
    columns: tuple[str, ...]


def items_digest(items: Iterable[Item]) -> str:
    """sha256 over what is known of each item but its pixels; the order does not matter.

    The size in bytes stands for the pixels: a picture that was replaced rarely has the same.
    """
    lines = sorted(
        json.dumps(
            [
                *(item.key, item.picture.size, item.label, item.caption, item.group, item.boxes),
                *(blob.size if blob else None for blob in (item.mask, item.labelmap)),
                *_asked_for(item),
            ]
        )
        for item in items
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _asked_for(item: Item) -> list[object]:
    """What only some sets have of an item: nothing where it was not asked for, so that digests stay."""
    found: list[object] = [["scalars", *item.scalars]] if item.scalars else []
    found += [["labels", *item.labels]] if item.labels else []
    return found if item.hole is None else [*found, ["hole", item.hole.size]]


def joined_digest(digests: Iterable[str]) -> str:
    """sha256 over the digests of the items of each shard, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"{number:05d}.safetensors"


def shard_tensors(
    mean: Latents, std: Latents | None, rows: Sequence[Row], extra: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one shard, as they are stored.

    Args:
        mean: of the posterior, in the number format to store.
        std: of the posterior; None for a bottleneck without noise.
        rows: what goes along with each latent.
        extra: further columns, `[N, ...]` each.

    Raises:
        DataError: a latent is not finite in the number format asked for.
    """
    moments = {"mean": mean} if std is None else {"mean": mean, "std": std}
    for values in moments.values():
        require_finite(values, rows, "the latents", "try --dtype float32")
    return {
        **moments,
        "label": torch.tensor([row.item.label for row in rows], dtype=torch.int64),
        "view": torch.tensor([row.view for row in rows], dtype=torch.int64),
        **text_columns("key", [row.item.key for row in rows]),
        **text_columns("caption", [row.item.caption for row in rows]),
        **text_columns("group", [row.item.group for row in rows]),
        **extra,
    }


def require_finite(values: Tensor, rows: Sequence[Row], what: str, advice: str) -> None:
    """Check what is to be stored, in the number format it is stored in.

    Args:
        values: `[N, ...]`.
        rows: what each belongs to.
        what: the values are, for the error.
        advice: what to do about it.

    Raises:
        DataError: some are NaN or infinite; the message names the picture.
    """
    finite = values.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        first = rows[int(finite.int().argmin())].item.key
        raise DataError(f"{what} of {first} are not finite as {values.dtype}; {advice}")


def box_columns(boxes: Sequence[Sequence[Box]]) -> dict[str, Tensor]:
    """The boxes of each row, one after the other: category, x0, y0, x1, y1."""
    offsets = np.cumsum([0, *(len(of_one) for of_one in boxes)])
    values = [tuple(box) for of_one in boxes for box in of_one]
    return {
        "boxes.values": torch.tensor(values, dtype=torch.float32).reshape(-1, 5),
        "boxes.offsets": torch.from_numpy(offsets),
    }


def columns_of(tensors: Iterable[str]) -> tuple[str, ...]:
    """The columns that tensors of these names make up."""
    found = {name.partition(".")[0] for name in tensors}
    return tuple(name for name in COLUMNS if name in found)


def read_texts(path: Path, name: str) -> list[str]:
    """A text column of one shard."""
    with safe_open(path, "np") as file:
        return unragged(file.get_tensor(f"{name}.bytes"), file.get_tensor(f"{name}.offsets"))


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
    source: Source,
    latent_shape: tuple[int, int, int],
    shards: Sequence[WrittenShard],
) -> Manifest:
    """Sum up the shards of a set, in order.

    Args:
        recipe: how the latents were made.
        source: says what classes, categories of boxes, scalars and colours are called.
        latent_shape: z, height, width; a shard of another shape says so in its entry.
        shards: all of them.

    Raises:
        DataError: the set is empty.
    """
    count = sum(shard.entry.count for shard in shards)
    if count == 0:
        raise DataError("not one picture could be encoded")
    all_facts = [shard.facts for shard in shards]
    values = sum(facts.moments[0] for facts in all_facts)
    mean = np.sum([facts.moments[1] for facts in all_facts], axis=0) / values
    square = np.sum([facts.moments[2] for facts in all_facts], axis=0) / values
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    usual = [shard.entry.shape in (None, latent_shape) for shard in shards]
    return Manifest(
        format=f"ldmkit.latents/{FORMAT_VERSIONS['latents']}",
        recipe=recipe,
        items=joined_digest(facts.items for facts in all_facts),
        count=count,
        latent_shape=latent_shape,
        columns=shards[0].columns,
        class_names=source.class_names,
        box_names=source.box_names,
        scalar_names=source.scalar_names,
        label_sets=source.label_sets,
        labelmap_colours=source.labelmap_colours,
        whitening=Whitening(mean=tuple(mean.tolist()), std=tuple(std.tolist())),
        shards=tuple(
            shard.entry.model_copy(update={"shape": None}) if plain else shard.entry
            for shard, plain in zip(shards, usual, strict=True)
        ),
        skipped=tuple(pair for facts in all_facts for pair in facts.skipped),
        converted=joined(facts.converted for facts in all_facts),
        versions=versions(),
    )


def text_columns(name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts of the rows as they are stored: their bytes in a row, and where each begins and ends."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.cumsum([0, *(len(text) for text in encoded)])
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {f"{name}.bytes": torch.from_numpy(data), f"{name}.offsets": torch.from_numpy(offsets)}


def unragged(data: np.ndarray, offsets: np.ndarray) -> list[str]:
    """The texts of a column that is stored as bytes and offsets."""
    whole = data.tobytes()
    pairs = itertools.pairwise(offsets.tolist())
    return [whole[start:stop].decode("utf-8", "surrogatepass") for start, stop in pairs]
