"""Which samples a step sees: a function of (seed, step), never of hidden state.

Training walks through permutations of the data, one for each epoch, laid end to end; step s with
batch size b takes positions s*b to s*b + b - 1. So a run can start anywhere and sees what an
uninterrupted run would have seen.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

BUCKETS = 6
"""Place in the seed tree of the order of buckets."""


def seed_for(seed: int, *place: int) -> int:
    """A 63-bit seed for one place (step, epoch, sample ...), independent of all other places."""
    sequence = np.random.SeedSequence(seed % (1 << 63), spawn_key=tuple(place))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A CPU generator for one place; the same numbers on every machine and device."""
    return torch.Generator().manual_seed(seed_for(seed, *place))


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_for(seed, epoch)).permutation(count)


def indices_of_step(step: int, *, count: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """The samples of one step, as (index into the data, position in the whole run)."""
    start, stop = step * batch_size, (step + 1) * batch_size
    indices: list[int] = []
    for epoch in range(start // count, (stop - 1) // count + 1):
        first = epoch * count
        part = _permutation(count, seed, epoch)[max(start - first, 0) : stop - first]
        indices += part.tolist()
    return list(zip(indices, range(start, stop), strict=True))


def bucketed_indices_of_step(
    step: int, *, counts: Sequence[int], batch_size: int, seed: int
) -> tuple[int, list[tuple[int, int]]]:
    """The samples of one step where only those of one bucket fit into a batch.

    In each epoch every bucket is shuffled and cut into batches, its last one filled up with its first
    samples; the batches of all buckets come in random order. So each sample is seen at least once.

    Args:
        step: of the run.
        counts: samples in each bucket.
        batch_size: samples for each step.
        seed: of the run.

    Returns:
        The bucket, and (index into the bucket, position in the whole run) of each sample.

    Raises:
        ValueError: all buckets are empty.
    """
    batches = sum(-(-count // batch_size) for count in counts)
    if batches == 0:
        raise ValueError("there are no samples in any bucket")
    epoch, place = divmod(step, batches)
    shuffled = _bucketed_epoch(tuple(counts), batch_size, seed, epoch)
    bucket, number = shuffled.batches[place].tolist()
    order = shuffled.orders[bucket]
    chosen = order[np.arange(number * batch_size, (number + 1) * batch_size) % len(order)]
    positions = range(step * batch_size, (step + 1) * batch_size)
    return bucket, list(zip(chosen.tolist(), positions, strict=True))


class _BucketedEpoch(NamedTuple):
    batches: np.ndarray
    """[batches, 2]: bucket, and number of the batch in it."""
    orders: list[np.ndarray]
    """A permutation of each bucket."""


@lru_cache(maxsize=2)
def _bucketed_epoch(
    counts: tuple[int, ...], batch_size: int, seed: int, epoch: int
) -> _BucketedEpoch:
    orders = [
        np.random.default_rng(seed_for(seed, BUCKETS, epoch, bucket)).permutation(count)
        for bucket, count in enumerate(counts)
    ]
    batches = [
        (bucket, number)
        for bucket, count in enumerate(counts)
        for number in range(-(-count // batch_size))
    ]
    draw = np.random.default_rng(seed_for(seed, BUCKETS, epoch))
    return _BucketedEpoch(draw.permutation(np.array(batches), axis=0), orders)


def is_held_back(key: str, share: float) -> bool:
    """Whether a sample is kept out of training: by hash of its key, so that every stage agrees."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
