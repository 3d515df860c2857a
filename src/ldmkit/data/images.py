"""Preprocessed pictures for training and encoding."""

import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.gaps import require_some, with_mask
from ldmkit.data.items import Item
from ldmkit.data.order import generator_for, indices_of_step, is_held_back
from ldmkit.data.pictures import Picture, decode_array, decode_picture
from ldmkit.data.preprocessing import preprocess
from ldmkit.errors import DataError, LdmkitError
from ldmkit.facts import Depth
from ldmkit.tensors import Images
from ldmkit.terminal import say

AUGMENTATION = 1
"""Place in the seed tree of the draws for random crops and flips."""
ALL = slice(None)
LOOKED_AT = 8
"""How many pictures are opened to learn about all."""


class TrainingImages(Dataset[Picture | LdmkitError]):
    """Pictures with random crops and flips drawn from (seed, position in the run).

    A picture that cannot be read is returned as its error: raised here, in a reading process, its
    sentence would reach the user wrapped in that process's traceback.
    """

    def __init__(self, items: list[Item], config: PreprocessingConfig, seed: int) -> None:
        self.items, self.config, self.seed = items, config, seed

    def __getitem__(self, place: tuple[int, int]) -> Picture | LdmkitError:
        """The picture at (index, position); see `order.indices_of_step`."""
        index, position = place
        draw = generator_for(self.seed, AUGMENTATION, position)
        try:
            item = self.items[index]
            return preprocess(read_picture(item, self.config), self.config, draw, item.name)
        except LdmkitError as error:
            return error


class Split(NamedTuple):
    """Items to train on and items held back."""

    training: list[Item]
    held_back: list[Item]


def split(items: list[Item], share: float) -> Split:
    """Divide items by the hash of their groups, or of their keys where they belong to none.

    Raises:
        DataError: nothing is left to train on.
    """
    training: list[Item] = []
    held_back: list[Item] = []
    for item in items:
        (held_back if is_held_back(item.group or item.key, share) else training).append(item)
    if not training:
        raise DataError(f"--holdout {share} leaves none of the {len(items)} pictures to train on")
    return Split(training, held_back)


def read_picture(item: Item, config: PreprocessingConfig) -> Picture:
    """Read and decode one item to `[channels, h, w]`: the range to [-1, 1], NaN where masked."""
    return decode_item(item, item.picture.read(), config)


def decode_item(item: Item, data: bytes, config: PreprocessingConfig) -> Picture:
    """`read_picture` where its bytes have been read already."""
    if any(blob is not None for blob in (item.mask, item.labelmap, item.hole)):  # of its whole size
        config = config.model_copy(update={"dct_scaling": False})
    picture = decode_picture(data, item.name, config)
    if item.mask is not None:
        picture = with_mask(picture, item.mask.read(), f"the mask of {item.name}")
    return require_some(picture, item.name)


def read_images(items: list[Item], config: PreprocessingConfig) -> Images:
    """Read a batch without randomness: centre crop, no flip. NaN marks pixels that do not count."""
    pictures = [
        require_some(
            preprocess(read_picture(item, config), config, None, item.name),
            f"the centre of {item.name}",
        )
        for item in items
    ]
    return torch.stack(pictures)


def depth_of(items: list[Item], config: PreprocessingConfig) -> Depth:
    """The widest number format among the first pictures; any but uint8 and uint16 is "float32"."""
    found: set[str] = set()
    for item in items[:LOOKED_AT]:
        found.add(decode_array(item.picture.read(), item.name, config).dtype.name)
    if not found <= {"uint8", "uint16"}:
        return "float32"
    return "uint16" if "uint16" in found else "uint8"


def say_what_is_clipped(items: list[Item], config: PreprocessingConfig) -> None:
    """Count the values of the first pictures that lie outside the declared range, and say so."""
    if config.range is None:
        return
    outside = counted = 0
    for item in items[:LOOKED_AT]:
        try:
            picture = read_picture(item, config)
        except DataError:  # whoever needs this picture will say so
            continue
        outside += int((picture.abs() > 1.0).sum())
        counted += int((~picture.isnan()).sum())
    if outside:
        low, high = config.range
        say(
            f"{outside / counted:.2%} of the values in the first {min(len(items), LOOKED_AT)} pictures "
            f"lie outside --preprocessing.range {low:g},{high:g} and are clipped to it"
        )


class _StepBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, position) from a step on, without end."""

    def __init__(self, count: int, batch_size: int, seed: int, start: int, rows: slice) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start, self.rows = start, rows

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while True:
            whole = indices_of_step(
                step, count=self.count, batch_size=self.batch_size, seed=self.seed
            )
            yield whole[self.rows]
            step += 1


def _heed_no_signals(worker: int) -> None:
    """For a reading process: whoever stops a job signals all its processes, and only one knows what to do."""
    del worker
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def training_batches(
    items: list[Item],
    config: PreprocessingConfig,
    *,
    batch_size: int,
    seed: int,
    start: int,
    workers: int,
    rows: slice = ALL,
) -> Iterator[Images]:
    """Endless batches `[b, c, size, size]`, beginning with that of step `start`; of each only `rows`.

    NaN marks pixels that do not count (see `gaps`); a random crop may hold no other.
    The sequence does not depend on `workers`, the number of reading processes.

    Args:
        items: to train on.
        config: how they are read.
        batch_size: of the whole batch.
        seed: of the run.
        start: step of the first batch.
        workers: processes that read.
        rows: of each batch that are wanted here, where several processes share it.

    Raises:
        DataError: a picture cannot be used; the message names it.
        StorageError: the disk or the network fails.
    """
    loader = DataLoader(
        TrainingImages(items, config, seed),
        batch_sampler=_StepBatches(len(items), batch_size, seed, start, rows),
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # else it would draw from the global one
        worker_init_fn=_heed_no_signals if workers else None,
    )
    for pictures in loader:
        bad = next((picture for picture in pictures if isinstance(picture, LdmkitError)), None)
        if bad is not None:
            raise bad
        yield torch.stack(pictures)
