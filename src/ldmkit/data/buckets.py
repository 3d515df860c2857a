"""Aspect-ratio buckets: a few shapes of about one area, and which of them suits a picture.

As in NovelAI's training (2022): pictures keep their composition, and all of a batch have one shape.
"""

import math
from collections.abc import Sequence

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.items import Item
from ldmkit.data.look import look_at
from ldmkit.errors import DataError, UsageError

Shape = tuple[int, int]
"""Height and width, pixels."""


def bucket_shapes(size: int, step: int, ratio: float) -> list[Shape]:
    """The shapes of about `size` x `size` pixels, from the widest to the tallest.

    Args:
        size: side of the square among them, pixels; a multiple of `step`.
        step: every side is a multiple of it, pixels.
        ratio: longer side over shorter side, at most.

    Raises:
        UsageError: `size` is not a multiple of `step`.
    """
    if size % step:
        raise UsageError(f"--bucket-step {step} does not divide the size {size}")
    shapes = set()
    for long in range(size, math.ceil(size * math.sqrt(ratio) / step) * step + 1, step):
        short = round(size * size / long / step) * step
        if short and long / short <= ratio:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes, key=lambda shape: shape[0] / shape[1])


def nearest_bucket(shape: Sequence[int], buckets: Sequence[Shape]) -> Shape:
    """The bucket whose ratio of sides is nearest to that of a picture of this height and width."""
    wanted = math.log(shape[0] / shape[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - wanted))


def sorted_into_buckets(
    items: Sequence[Item], buckets: Sequence[Shape], config: PreprocessingConfig
) -> list[tuple[Shape, list[Item]]]:
    """Items by bucket, in their order within each; reads the header of every picture.

    A picture whose header cannot be read goes to the square, where encoding names it.
    """
    sorted_items: dict[Shape, list[Item]] = {bucket: [] for bucket in buckets}
    square = (config.size, config.size)
    for item in items:
        try:
            shape = look_at(item.picture.read(), item.name).shape
        except DataError:
            shape = square
        sorted_items[nearest_bucket(shape, buckets)].append(item)
    return [(bucket, members) for bucket, members in sorted_items.items() if members]
