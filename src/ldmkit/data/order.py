"""Which samples a step sees: a function of (seed, step), never of hidden state.

Training walks through permutations of the data, one for each epoch, laid end to end; step s with
batch size b takes positions s*b to s*b + b - 1. So a run can start anywhere and sees what an
uninterrupted run would have seen.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch


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
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [(int(_permutation(count, seed, p // count)[p % count]), p) for p in positions]


def is_held_back(key: str, share: float) -> bool:
    """Whether a sample is kept out of training: by hash of its key, so that every stage agrees."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
