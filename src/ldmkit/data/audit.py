"""What is wrong or odd with one picture, found by reading it as training does.

What is kept of a picture is small, so that a million of them fit into memory: what was noted, its
header, and hashes that tell whether others are the same.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import read_picture
from ldmkit.data.items import Item
from ldmkit.data.labelmaps import read_labelmap
from ldmkit.data.look import Look, conversions, look_at
from ldmkit.data.masks import read_hole
from ldmkit.data.pictures import Picture
from ldmkit.data.similarity import perceptual_hash, small_version
from ldmkit.errors import DataError

Severity = Literal["error", "warning"]

HUGE = 25_000_000
"""Pixels from which decoding one picture takes longer than a training step on it."""
CHUNK = 16
"""Pictures that a reading process hands over at once."""
KINDS = (
    ("is not a picture", "not a picture"),
    ("pixels; at most", "too many pixels"),
    ("exceeds limit", "too many pixels"),
    ("bytes; at most", "too many bytes"),
    ("is cut off at", "damaged tar"),
    ("Python objects", "Python objects"),
    ("damaged", "damaged picture"),
    ("cannot read", "cannot be read"),
    ("has changed", "changed during the check"),
    ("no pixel that counts", "no pixel counts"),
    ("must be declared", "no range declared"),
    ("the model takes", "wrong channels"),
    ("the model's", "wrong channels"),
    ("the mask of", "bad mask"),
)
"""Words of an error -> the kind it is counted as; the first that fits."""


class Note(NamedTuple):
    """Something wrong or odd with a picture."""

    kind: str
    """A few words, the same for all of its kind."""
    severity: Severity
    """error = it cannot be used, warning = it is used, but look."""
    text: str
    """One sentence: what, where, what happens."""


class Examined(NamedTuple):
    """What is kept of a picture."""

    notes: tuple[Note, ...]
    look: Look | None = None
    """None where not even the header can be read."""
    digest: bytes = b""
    """sha256 of the file's bytes; empty where they cannot be read."""
    pixels: bytes = b""
    """sha256 of the decoded values and their shape; empty where they cannot be decoded."""
    hash: int | None = None
    """See `similarity.perceptual_hash`; None for a picture that shows nothing."""


class Held(NamedTuple):
    """A blob that was read: its bytes are looked at twice and fetched once."""

    name: str
    data: bytes

    @property
    def size(self) -> int:
        """How many bytes."""
        return len(self.data)

    def read(self) -> bytes:
        """The bytes."""
        return self.data


class Examinations(Dataset[Examined]):
    """`examine` for each item, for reading processes."""

    def __init__(self, items: list[Item], config: PreprocessingConfig) -> None:
        self.items, self.config = items, config

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Examined:
        """The item of this index."""
        return examine(self.items[index], self.config)


def examinations(
    items: list[Item], config: PreprocessingConfig, workers: int
) -> Iterator[list[Examined]]:
    """Read all pictures, in order, some at a time.

    Args:
        items: of a source.
        config: what training would read them as.
        workers: reading processes; 0 = this one.
    """
    loader = DataLoader(
        Examinations(items, config),
        batch_size=CHUNK,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    yield from loader


def examine(item: Item, config: PreprocessingConfig) -> Examined:
    """Read one picture as training does, and note what is wrong or odd with it."""
    try:
        data = item.picture.read()
    except DataError as error:
        return Examined((_fault(error),))
    digest = hashlib.sha256(data).digest()
    if not data:
        text = f"{item.name} is empty (0 bytes); copy it again"
        return Examined((Note("empty file", "error", text),), digest=digest)
    held = item._replace(picture=Held(item.name, data))
    look = _look(data, item.name)
    try:
        picture = read_picture(held._replace(mask=None), config)
    except DataError as error:
        return Examined((_fault(error),), look, digest)
    notes = [
        Note(phrase, "warning", f"{item.name}: {phrase}")
        for phrase in (conversions(look, item.name, config) if look else ())
    ]
    notes += [*_of_values(picture, item.name, config), *_of_companions(held, config)]
    shape = str(tuple(picture.shape)).encode()
    pixels = hashlib.sha256(shape + picture.contiguous().numpy().tobytes()).digest()
    shows = not any(note.kind == "constant picture" for note in notes)
    seen = perceptual_hash(small_version(picture)) if shows else None
    return Examined(tuple(notes), look, digest, pixels, seen)


def _look(data: bytes, name: str) -> Look | None:
    try:
        return look_at(data, name)
    except DataError:  # reading its pixels says the same, in better words
        return None


def _fault(error: DataError) -> Note:
    text = str(error)
    kind = next((kind for words, kind in KINDS if words in text), "cannot be used")
    return Note(kind, "error", text)


def _of_values(picture: Picture, name: str, config: PreprocessingConfig) -> Iterator[Note]:
    height, width = picture.shape[1:]
    if height * width > HUGE:
        text = f"{name} has {width} x {height} pixels; a smaller copy is read faster at each step"
        yield Note("huge picture", "warning", text)
    gaps = picture[0].isnan()
    share = gaps.float().mean().item()
    if share:
        text = f"{name}: {share:.2%} of the pixels are NaN or infinite and do not count"
        yield Note("NaN or infinite pixels", "warning", text)
    values = picture[:, ~gaps]
    if (values == values[:, :1]).all():
        yield Note("constant picture", "warning", f"{name} is of one colour, and shows nothing")
    outside = (values.abs() > 1.0).float().mean().item()
    if outside and config.range is not None:
        low, high = config.range
        text = f"{name}: {outside:.2%} of the values lie outside {low:g},{high:g} and are clipped"
        yield Note("values outside --range", "warning", text)


def _of_companions(item: Item, config: PreprocessingConfig) -> Iterator[Note]:
    """What is wrong with the mask, the label map and the mask of the hole."""
    try:
        if item.mask is not None:
            read_picture(item, config)
    except DataError as error:
        yield _fault(error)
    try:
        if item.labelmap is not None:
            read_labelmap(item.labelmap, look_at(item.picture.read(), item.name).shape)
    except DataError as error:
        yield Note("bad label map", "error", str(error))
    try:
        if item.hole is not None:
            height, width = look_at(item.picture.read(), item.name).shape
            read_hole(item.hole, (height, width))
    except DataError as error:
        yield Note("bad hole mask", "error", str(error))
