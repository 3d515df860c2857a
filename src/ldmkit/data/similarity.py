"""Which pictures show nearly the same: hashes that survive re-encoding, and a second look.

A hash of 64 bits finds candidates among millions; it knows no colour and little detail, so each
candidate is looked at again on a small coloured version before it is called the same.
"""

import itertools
from collections import defaultdict

import numpy as np
import torch.nn.functional as F

from ldmkit.data.pictures import Picture

SIDE = 32
"""Of the small versions, pixels."""
LOW = 8
"""Frequencies kept along each axis, each of which gives a bit."""
CLEAR = 0.05
"""Share of the standard deviation of all frequencies above which one counts as there; those about zero,
which an encoder's noise turns around, are then nearly all not there."""
MAX_BITS = 3
"""Bits in which the hashes of one picture's versions may differ."""
BANDS = MAX_BITS + 1
"""Parts of a hash; one of them is untouched if no more than `MAX_BITS` bits differ."""
MAX_MEAN, MAX_PIXEL = 6.0, 60.0
"""Differences of two small versions, of 255, up to which they may be the same picture."""
AREA, MAX_AREA = 4, 12.0
"""Side of areas, pixels of a small version, and how far their means may differ: noise averages out
there, another shade or another shape does not."""
NOISE, PEAK = 12.0, 10.0
"""Largest difference of a pixel: NOISE + PEAK * the mean one. Another encoding changes all edges a
little; where little changes but in one place, something else is shown there. Set on 64 pixel emoji
(docs/log.md)."""


def small_version(picture: Picture) -> np.ndarray:
    """uint8 `[SIDE, SIDE, 3]`: averages over areas, whatever the shape; gaps are the middle grey.

    Args:
        picture: `[c, h, w]` in [-1, 1]; one or two channels are shown as grey, of more the first three.
    """
    shown = (picture[:3] if len(picture) >= 3 else picture[:1]).nan_to_num(0.0).clamp(-1.0, 1.0)
    small = F.adaptive_avg_pool2d(shown, SIDE).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return np.rint((small + 1.0) * 127.5).astype(np.uint8)


def perceptual_hash(small: np.ndarray) -> int:
    """64 bits: which low frequencies of the grey values are clearly positive.

    After pHash (Zauner 2010), which takes those above the median: half of them lie about zero in smooth
    pictures and flip in every other copy (docs/log.md).

    Args:
        small: `[SIDE, SIDE, 3]`.
    """
    grey = small.mean(axis=2)
    low = _COSINES @ grey @ _COSINES.T
    low[0, 0] = 0.0  # the mean, which a brighter copy changes
    bits = low > CLEAR * low.std()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def close_pairs(hashes: np.ndarray) -> list[tuple[int, int]]:
    """All pairs (i < j) of hashes that differ in at most `MAX_BITS` bits, in order.

    Only those are compared that share one band of bits, so the time grows with the number of hashes
    and of look-alikes, not with the number of pairs.

    Args:
        hashes: uint64 `[n]`.
    """
    found: set[tuple[int, int]] = set()
    bits = np.uint64(64 // BANDS)
    for band in range(BANDS):
        part = (hashes >> (np.uint64(band) * bits)) & ((np.uint64(1) << bits) - np.uint64(1))
        order = np.argsort(part, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            for place, first in enumerate(bucket[:-1].tolist()):
                rest = bucket[place + 1 :]
                near = rest[np.bitwise_count(hashes[rest] ^ hashes[first]) <= MAX_BITS]
                found |= {(first, other) for other in near.tolist()}
    return sorted(found)


def same_picture(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two small versions differ by no more than another encoding makes them differ."""
    difference = one.astype(np.float64) - other
    areas = difference.reshape(SIDE // AREA, AREA, SIDE // AREA, AREA, 3).mean(axis=(1, 3))
    area, mean, peak = (
        float(np.abs(found).max()) for found in (areas, np.abs(difference).mean(), difference)
    )
    return area <= MAX_AREA and mean <= MAX_MEAN and peak <= min(MAX_PIXEL, NOISE + PEAK * mean)


def groups_of(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """What hangs together by pairs, each group in order."""
    leader: dict[int, int] = {}

    def root(index: int) -> int:
        while leader.setdefault(index, index) != index:
            index = leader[index]
        return index

    for one, other in pairs:
        first, second = sorted((root(one), root(other)))
        leader[second] = first
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index in sorted(set(itertools.chain.from_iterable(pairs))):
        members[root(index)].append(index)
    return list(members.values())


def _cosines() -> np.ndarray:
    """Rows of the discrete cosine transform: frequencies 0 to LOW - 1 over SIDE pixels."""
    frequency, place = np.arange(LOW)[:, None], np.arange(SIDE)[None, :]
    return np.cos(np.pi / SIDE * frequency * (place + 0.5))


_COSINES = _cosines()
