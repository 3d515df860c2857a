"""What `encode` reads: the views of each picture and all that goes along with them, in batches.

Which items a shard holds, and which of them go through the network together, is fixed before the
first is read: the bytes depend neither on reading processes nor on how many jobs share the work.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.degradation import degraded
from ldmkit.data.gaps import fill_gaps, require_some
from ldmkit.data.images import decode_item
from ldmkit.data.items import Box, Item
from ldmkit.data.labelmaps import read_labelmap
from ldmkit.data.look import conversions, look_at
from ldmkit.data.masks import random_hole, read_hole
from ldmkit.data.order import generator_for, seed_for
from ldmkit.data.pictures import Picture
from ldmkit.data.placement import Placement, place, place_boxes
from ldmkit.data.preprocessing import lay, lay_classes
from ldmkit.data_configs import DegradationName, HoleKind
from ldmkit.errors import DataError, LdmkitError
from ldmkit.facts import Depth


class Task(NamedTuple):
    """One shard to make."""

    number: int
    start: int
    """Place of its first item in the whole order."""
    items: tuple[Item, ...]
    size: tuple[int, int]
    """Height and width of its pictures, pixels."""

    @property
    def stop(self) -> int:
        """Place after its last item."""
        return self.start + len(self.items)


class ViewSettings(NamedTuple):
    """How the views of a picture differ; the first is always the plain one."""

    per_picture: int = 1
    flip: bool = False
    """Mirror half of the further views."""
    zoom: float = 1.0
    """Further views show crops of down to 1 / zoom of the shorter side."""
    jitter: float = 0.0
    """Largest change of brightness and of contrast in further views, as a factor of 1 -+ jitter."""
    seed: int = 0


class LowResolution(NamedTuple):
    """How the small version of each view is made."""

    ratio: int
    """Times smaller, in height and in width."""
    degradation: DegradationName
    seed: int
    depth: Depth
    """Number format of the pictures."""


class Holes(NamedTuple):
    """What is to be painted in, in each view."""

    kind: HoleKind
    """given = as the items say, else drawn."""
    seed: int


class Companions(NamedTuple):
    """What is made of each view beside its latents; None for what is not."""

    lowres: LowResolution | None = None
    holes: Holes | None = None


NONE = Companions()


class View(NamedTuple):
    """One view of a picture."""

    picture: Picture
    boxes: tuple[Box, ...]
    labelmap: Tensor | None
    lowres: Picture | None
    hole: Tensor | None = None
    """`[h, w]`, uint8, 1 = hole."""


class Reading(NamedTuple):
    """What became of one item."""

    place: int
    """In its shard."""
    views: tuple[View, ...]
    conversions: tuple[str, ...]
    error: LdmkitError | None
    """A DataError is about this item alone; any other is about all."""


class Batch(NamedTuple):
    """Views of some neighbouring items of one shard, ready for the network."""

    shard: int
    """Place of its task in the list."""
    images: Tensor | None
    """`[b, c, h, w]`, NaN in pixels that do not count; None where nothing could be read."""
    readings: list[Reading]
    """One for each item, in order; their views without pictures, which are in `images`."""


def plan_shards(
    parts: Sequence[tuple[tuple[int, int], Sequence[Item]]],
    shard_size: int,
    *,
    first_number: int = 0,
    first_item: int = 0,
) -> list[Task]:
    """Divide items into shards of one shape each.

    Args:
        parts: height and width, pixels, and the items of that shape, in order.
        shard_size: items in a shard; the last of a part may have fewer.
        first_number: of the first shard.
        first_item: place of the first item in the whole order.
    """
    tasks: list[Task] = []
    start = first_item
    for size, items in parts:
        for first in range(0, len(items), shard_size):
            members = tuple(items[first : first + shard_size])
            tasks.append(Task(first_number + len(tasks), start, members, size))
            start += len(members)
    return tasks


def read_batches(
    tasks: Sequence[Task],
    preprocessing: PreprocessingConfig,
    views: ViewSettings,
    *,
    companions: Companions = NONE,
    batch_size: int,
    workers: int,
) -> Iterator[Batch]:
    """All batches of all tasks, in order; no batch straddles two shards.

    Args:
        tasks: the shards to make.
        preprocessing: without randomness, which the views bring.
        views: of each item.
        companions: what else is made of each view.
        batch_size: views in a batch, at most (but all views of an item stay together).
        workers: processes that read; 0 reads here.
    """
    items_at_once = max(1, batch_size // views.per_picture)
    chunks = [
        [(shard, place) for place in range(first, min(first + items_at_once, len(task.items)))]
        for shard, task in enumerate(tasks)
        for first in range(0, len(task.items), items_at_once)
    ]
    loader = DataLoader(
        _Readings(tasks, preprocessing, views, companions),
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=_batch,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    yield from loader


class _Readings(Dataset[tuple[int, Reading]]):
    """The reading of the item at (task, place in its shard)."""

    def __init__(
        self,
        tasks: Sequence[Task],
        preprocessing: PreprocessingConfig,
        views: ViewSettings,
        companions: Companions,
    ) -> None:
        self.tasks, self.preprocessing, self.views = tasks, preprocessing, views
        self.companions = companions

    def __getitem__(self, address: tuple[int, int]) -> tuple[int, Reading]:
        shard, position = address
        task = self.tasks[shard]
        item = task.items[position]
        try:
            views, changes = read_views(
                item, self.preprocessing, self.views, task.size, self.companions
            )
        except LdmkitError as error:  # raised by who reads this, in the process that people see
            return shard, Reading(position, (), (), error)
        return shard, Reading(position, views, changes, None)


def _batch(members: list[tuple[int, Reading]]) -> Batch:
    readings = [reading for _, reading in members]
    pictures = [view.picture for reading in readings for view in reading.views]
    images = torch.stack(pictures) if pictures else None
    none = torch.empty(0)
    bare = [
        reading._replace(views=tuple(view._replace(picture=none) for view in reading.views))
        for reading in readings
    ]
    return Batch(members[0][0], images, bare)


def read_views(
    item: Item,
    preprocessing: PreprocessingConfig,
    settings: ViewSettings,
    size: tuple[int, int],
    companions: Companions = NONE,
) -> tuple[tuple[View, ...], tuple[str, ...]]:
    """The views of one item, and what its decoding changed.

    Draws depend on the seed, the item's key and the view alone.

    Raises:
        DataError: the picture or what goes along with it cannot be used.
    """
    data = item.picture.read()
    needed = math.ceil(preprocessing.size * (settings.zoom if settings.per_picture > 1 else 1.0))
    whole = preprocessing.model_copy(update={"size": needed})  # what scaled decoding has to leave
    picture = decode_item(item, data, whole)
    changes = conversions(look_at(data, item.name), item.name, preprocessing)
    classes = read_labelmap(item.labelmap, picture.shape[1:]) if item.labelmap else None
    given = _given_hole(item, picture.shape[1:], companions.holes)
    views = []
    for number in range(settings.per_picture):
        where = _placement(item, picture.shape[1:], preprocessing, settings, size, number)
        seen = lay(picture, where, preprocessing)
        if number and settings.jitter:
            seen = _jittered(seen, settings.jitter, _draw(item, settings, number, 1))
        seen = require_some(seen, f"the part of {item.name} that is encoded")
        labelmap = None if classes is None else lay_classes(classes, where)
        hole = None if given is None else lay_classes(given, where)
        if companions.holes is not None and given is None:
            hole = _drawn_hole(item, size, companions.holes, number)
        lowres = companions.lowres
        small = None if lowres is None else _small(seen, item, lowres, number)
        views.append(View(seen, place_boxes(item.boxes, where), labelmap, small, hole))
    return tuple(views), changes


def _placement(
    item: Item,
    shape: Sequence[int],
    preprocessing: PreprocessingConfig,
    settings: ViewSettings,
    size: tuple[int, int],
    number: int,
) -> Placement:
    if number == 0:
        return place(shape, preprocessing, None, size=size, name=item.name)
    draw = _draw(item, settings, number, 0)
    zoom = 1.0 + float(torch.rand((), generator=draw)) * (settings.zoom - 1.0)
    moving = preprocessing.model_copy(update={"crop": "random", "flip": settings.flip})
    return place(shape, moving, draw, size=size, zoom=zoom, name=item.name)


def _small(picture: Picture, item: Item, lowres: LowResolution, number: int) -> Picture:
    draw = np.random.default_rng(seed_for(lowres.seed, _number_of(item), number, 2))
    whole = fill_gaps(picture[None]).images[0]
    return degraded(whole, lowres.ratio, lowres.degradation, draw, depth=lowres.depth)


def _given_hole(item: Item, shape: Sequence[int], holes: Holes | None) -> Tensor | None:
    """The hole of the whole picture that the user gave, uint8; None where it is drawn, or none asked for."""
    if holes is None or holes.kind != "given":
        return None
    if item.hole is None:
        raise DataError(f"{item.name} has no hole mask")
    return torch.from_numpy(read_hole(item.hole, (shape[0], shape[1])).astype(np.uint8))


def _drawn_hole(item: Item, size: tuple[int, int], holes: Holes, number: int) -> Tensor:
    draw = np.random.default_rng(seed_for(holes.seed, _number_of(item), number, 3))
    mixture = None if holes.kind == "mixed" else {holes.kind: 1.0}
    return torch.from_numpy(random_hole(draw, *size, mixture).astype(np.uint8))


def _draw(item: Item, settings: ViewSettings, *place: int) -> torch.Generator:
    return generator_for(settings.seed, _number_of(item), *place)


def _number_of(item: Item) -> int:
    key = hashlib.sha256(item.key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(key[:8], "big")


def _jittered(picture: Picture, amount: float, draw: torch.Generator) -> Picture:
    """Brightness, then contrast about the mean, each by a factor of 1 -+ amount, in the range."""
    bright, contrast = (1.0 + amount * (2.0 * torch.rand(2, generator=draw) - 1.0)).tolist()
    shares = (picture + 1.0) / 2.0 * bright
    mean = shares.nanmean()
    return (((shares - mean) * contrast + mean) * 2.0 - 1.0).clamp(-1.0, 1.0)
