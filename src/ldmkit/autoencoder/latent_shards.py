"""From pictures to shards of latents: what `encode` computes between reading and writing."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.encoding import Batch, Companions, Task, View, ViewSettings, read_batches
from ldmkit.data.gaps import fill_gaps
from ldmkit.data.latents import (
    IMAGE_EMBEDDING,
    STORED_DTYPES,
    Row,
    box_columns,
    items_digest,
    moments_of,
    require_finite,
    shard_tensors,
)
from ldmkit.data.tally import tally_of
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import DataError
from ldmkit.facts import AutoencoderFacts, Depth, Facts, ShardFacts
from ldmkit.label_names import UNLABELLED
from ldmkit.pixels import to_pixels
from ldmkit.terminal import Track

Embed = Callable[[Sequence[str]], Tensor]
"""Texts -> their embeddings `[texts, t, w]`, float32; the empty text has one too."""
Fill = Callable[[Tensor, Tensor], Tensor]
"""Pictures `[b, c, h, w]` in [-1, 1] and holes `[b, h, w]`, bool -> the pictures, their holes filled."""

See = Callable[[Tensor], Tensor]
"""Pictures `[b, c, h, w]` in [-1, 1] -> their embeddings `[b, t, w]`, float32; of none, too."""


class Work(NamedTuple):
    """What stays the same from shard to shard."""

    recipe: Facts
    preprocessing: PreprocessingConfig
    views: ViewSettings
    columns: frozenset[str]
    """Which of the columns are stored that only some sets have."""
    depth: Depth
    """Number format of the pictures that the autoencoder saw."""
    companions: Companions
    """How the columns lowres and hole are made."""
    embed: Embed | None = None
    """How the column text is made; None where there is none."""
    fill: Fill | None = None
    """How the column masked is made; None where there is none."""
    see: See | None = None
    """How the column image_embedding is made; None where there is none."""


class Shard(NamedTuple):
    """One shard before it is written."""

    tensors: dict[str, Tensor]
    facts: ShardFacts


class EncodedBatch(NamedTuple):
    """Some pictures and their latents as they are stored; None where nothing could be read."""

    batch: Batch
    mean: Tensor | None
    std: Tensor | None
    masked: Tensor | None
    """Means of the pictures whose holes are filled."""
    embedded: Tensor | None
    """Embeddings of the pictures."""


def bytes_of(config: EncodeConfig, facts: AutoencoderFacts, pictures: int) -> int:
    """About how many bytes the shards of so many pictures take: their means and standard deviations."""
    side = (config.size or facts.preprocessing.size) // facts.factor
    values = 2 * facts.latent_channels * side**2
    return pictures * config.views * values * STORED_DTYPES[config.dtype].itemsize


def encode_shards(
    model: Autoencoder, tasks: Sequence[Task], work: Work, config: EncodeConfig, bar: Track
) -> Iterator[tuple[Task, Shard]]:
    """Make shards, one after the other, while the pictures of the next are read.

    Raises:
        DataError: more pictures than `max_bad` allows cannot be used.
    """
    batch_size = 1 if config.tile else config.batch_size
    batches = read_batches(
        tasks,
        work.preprocessing,
        work.views,
        companions=work.companions,
        batch_size=batch_size,
        workers=config.workers,
    )
    bad_left = int(config.max_bad * sum(len(task.items) for task in tasks))
    for number, members in itertools.groupby(batches, key=lambda batch: batch.shard):
        parts = []
        for batch in members:
            bad_left -= bad_in(batch, bad_left)
            stored = STORED_DTYPES[config.dtype]
            parts.append(encode_batch(model, batch, batch_size, stored, work.fill, work.see))
            bar.advance(len(batch.readings))
        yield tasks[number], build_shard(model, tasks[number], parts, work)


def bad_in(batch: Batch, allowed: int) -> int:
    """How many items of a batch cannot be used.

    Raises:
        DataError: more than `allowed`.
        LdmkitError: it is not the fault of an item.
    """
    errors = [reading.error for reading in batch.readings if reading.error]
    others = [error for error in errors if not isinstance(error, DataError)]
    if others:
        raise others[0]
    if len(errors) > allowed:
        first = errors[allowed]
        raise DataError(f"{first} (to leave out unreadable pictures: --max-bad 0.01)")
    return len(errors)


@torch.inference_mode()
def encode_batch(
    model: Autoencoder,
    batch: Batch,
    batch_size: int,
    stored: torch.dtype,
    fill: Fill | None = None,
    see: See | None = None,
) -> EncodedBatch:
    """Mean and standard deviation of the posteriors, and what goes with them, as they are stored."""
    if batch.images is None:
        return EncodedBatch(batch, None, None, None, None)
    images = fill_gaps(batch.images).images
    posteriors = [model.encode(part.to(model.device)) for part in images.split(batch_size)]
    mean = torch.cat([posterior.mean.to(stored).cpu() for posterior in posteriors])
    stds = [part.std.to(stored).cpu() for part in posteriors if part.std is not None]
    masked = None
    if fill is not None:
        filled = fill(images, _holes_of(batch)).split(batch_size)
        means = [model.encode(part.to(model.device)).mean for part in filled]
        masked = torch.cat([part.to(stored).cpu() for part in means])
    embedded = None if see is None else see(images).half()
    return EncodedBatch(batch, mean, torch.cat(stds) if stds else None, masked, embedded)


def _holes_of(batch: Batch) -> Tensor:
    views = [view for reading in batch.readings for view in reading.views]
    return torch.stack([view.hole for view in views if view.hole is not None]).bool()


def build_shard(model: Autoencoder, task: Task, parts: Sequence[EncodedBatch], work: Work) -> Shard:
    """Put the batches of a shard together."""
    factor = model.config.factor
    shape = (model.latent_channels, task.size[0] // factor, task.size[1] // factor)
    none = torch.empty(0, *shape, dtype=STORED_DTYPES[work.recipe["dtype"]])
    mean = torch.cat([none, *(part.mean for part in parts if part.mean is not None)])
    std = None
    if model.is_noisy:
        std = torch.cat([none, *(part.std for part in parts if part.std is not None)])
    readings = [reading for part in parts for reading in part.batch.readings]
    rows = [
        Row(task.items[reading.place], number, view.boxes)
        for reading in readings
        for number, view in enumerate(reading.views)
    ]
    images = [part.batch.images for part in parts if part.batch.images is not None]
    views = [view for reading in readings for view in reading.views]
    extra = extra_columns(work, task, images, views)
    extra |= _label_columns(work, rows) | _scalar_column(work, rows)
    if work.embed is not None:
        extra |= text_embeddings(rows, work.embed)
    if work.fill is not None:
        masked = torch.cat([none, *(part.masked for part in parts if part.masked is not None)])
        require_finite(masked, rows, "the masked latents", "try --dtype float32")
        extra["masked"] = masked
    if work.see is not None:
        extra |= picture_embeddings(parts, rows, work.see)
    tensors = shard_tensors(mean, std, rows, extra)
    changes = tally_of((task.items[reading.place].key, reading.conversions) for reading in readings)
    facts = ShardFacts(
        fingerprint="",
        recipe=work.recipe,
        items=items_digest(task.items),
        start=task.start,
        stop=task.stop,
        skipped=tuple(
            (task.items[reading.place].key, str(reading.error))
            for reading in readings
            if reading.error
        ),
        converted=changes,
        moments=moments_of(mean, std),
    )
    return Shard(tensors, facts)


def extra_columns(
    work: Work,
    task: Task,
    images: Sequence[Tensor],
    views: Sequence[View],
) -> dict[str, Tensor]:
    """The columns that only some sets have."""
    height, width = task.size
    columns: dict[str, Tensor] = {}
    if "boxes" in work.columns:
        columns |= box_columns([view.boxes for view in views])
    if "labelmap" in work.columns:
        unknown = torch.full(task.size, UNLABELLED, dtype=torch.uint8)
        maps = [unknown if view.labelmap is None else view.labelmap for view in views]
        columns["labelmap"] = torch.stack(maps) if maps else unknown[None][:0]
    if "mask" in work.columns:
        none = torch.empty(0, height, width, dtype=torch.uint8)
        columns["mask"] = torch.cat([none, *((~x.isnan().any(1)).byte() for x in images)])
    if "hole" in work.columns:
        none = torch.empty(0, height, width, dtype=torch.uint8)
        columns["hole"] = torch.cat([none, *(v.hole[None] for v in views if v.hole is not None)])
    if "image" in work.columns:
        none = torch.empty(0, work.preprocessing.channels, height, width, dtype=torch.uint8)
        columns["image"] = torch.cat([none, *(to_pixels(fill_gaps(x).images) for x in images)])
    if work.companions.lowres is not None:
        ratio = work.companions.lowres.ratio
        side = (height // ratio, width // ratio)
        none = torch.empty(0, work.preprocessing.channels, *side)
        small = [view.lowres[None] for view in views if view.lowres is not None]
        stored = torch.cat([none, *small])
        columns["lowres"] = to_pixels(stored) if work.depth == "uint8" else stored
    return columns


def text_embeddings(rows: Sequence[Row], embed: Embed) -> dict[str, Tensor]:
    """The embedding of the first line of each caption, and of the empty text, as they are stored.

    Raises:
        DataError: one is not finite as float16.
    """
    empty = embed([""])[0].half()
    texts = [first_line(row.item.caption) for row in rows]
    told = torch.tensor([bool(text) for text in texts], dtype=torch.bool)
    found = empty.repeat(len(rows), 1, 1)  # a row without a caption has exactly the empty text's
    if told.any():
        found[told] = embed([text for text in texts if text]).half()
    require_finite(found, rows, "the text embedding", "take another --text-encoder")
    return {"text": found, "text.empty": empty}


def picture_embeddings(
    parts: Sequence[EncodedBatch], rows: Sequence[Row], see: See
) -> dict[str, Tensor]:
    """The embeddings of a shard's pictures, as they are stored.

    Raises:
        DataError: one is not finite as float16.
    """
    none = see(torch.empty(0, 1, 1, 1)).half()
    found = torch.cat([none, *(part.embedded for part in parts if part.embedded is not None)])
    require_finite(found, rows, "the picture embedding", "take another --image-encoder")
    return {IMAGE_EMBEDDING: found}


def first_line(caption: str) -> str:
    """The first of several captions; "" where there is none."""
    return next((line.strip() for line in caption.split("\n") if line.strip()), "")


def _label_columns(work: Work, rows: Sequence[Row]) -> dict[str, Tensor]:
    names = work.recipe.get("labels")
    if names is None:
        return {}
    values = [row.item.labels for row in rows]
    return {"labels": torch.tensor(values, dtype=torch.int64).reshape(-1, len(names))}


def _scalar_column(work: Work, rows: Sequence[Row]) -> dict[str, Tensor]:
    names = work.recipe.get("scalars")
    if names is None:
        return {}
    values = [row.item.scalars for row in rows]
    return {"scalars": torch.tensor(values, dtype=torch.float32).reshape(-1, len(names))}
