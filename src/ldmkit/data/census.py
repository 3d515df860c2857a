"""What is wrong or odd with pictures as a set: mixed kinds, captions, classes, duplicates, leaks."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.audit import Examined, Severity
from ldmkit.data.images import read_picture
from ldmkit.data.items import NO_LABEL, Item, Source
from ldmkit.data.look import Look
from ldmkit.data.similarity import close_pairs, groups_of, same_picture, small_version
from ldmkit.errors import DataError

LONG_CAPTION = 300
"""Characters that about 77 tokens of CLIP hold, which is all it reads."""
IMBALANCE, FEW = 20, 5
"""Largest class over smallest one, and pictures of a class, beyond which a warning is due."""


class Finding(NamedTuple):
    """One thing wrong or odd, and where."""

    kind: str
    """A few words, the same for all of its kind."""
    severity: Severity
    """error = it cannot be used, warning = it is used, but look."""
    name: str
    """The picture's key, or what else is concerned."""
    text: str
    """One sentence: what, where, what happens or what to do."""
    pictures: tuple[int, ...] = ()
    """Indices of the pictures that show it."""


def mixed(items: Sequence[Item], examined: Sequence[Examined]) -> Iterator[Finding]:
    """Pictures whose channels or bits are not those of most others."""
    looks = [(index, found.look) for index, found in enumerate(examined) if found.look]
    for unit, value_of in (("channels", _channels), ("bits", _bits)):
        counts = Counter(value_of(look) for _, look in looks)
        if len(counts) < 2:
            continue
        usual = counts.most_common(1)[0][0]
        for index, look in looks:
            if value_of(look) != usual:
                item = items[index]
                text = f"{item.name} has {value_of(look)} {unit}, most others have {usual}"
                yield Finding(f"mixed {unit}", "warning", item.key, text, (index,))


def _channels(look: Look) -> int:
    return look.channels


def _bits(look: Look) -> int:
    return look.bits


def incomplete(items: Sequence[Item], known: Collection[tuple[str, str]]) -> Iterator[Finding]:
    """Pictures without a caption or label where others have one.

    Args:
        items: of a source.
        known: kind and name of what its scan has found already, which is not found again.
    """
    has: tuple[tuple[str, str, Callable[[Item], bool]], ...] = (
        ("empty caption", "caption", lambda item: bool(item.caption.strip())),
        ("no label", "label", lambda item: NO_LABEL not in (item.labels or (item.label,))),
    )
    for kind, what, holds in has:
        without = [index for index, item in enumerate(items) if not holds(item)]
        if len(without) == len(items):
            continue
        for index in without:
            item = items[index]
            if (kind, item.key) not in known:
                text = f"{item.name} has no {what}, or an empty one, and others have"
                yield Finding(kind, "warning", item.key, text, (index,))


def missing_scalars(source: Source) -> Iterator[Finding]:
    """Pictures whose numbers are not all known."""
    for place, name in enumerate(source.scalar_names):
        for index, item in enumerate(source.items):
            if math.isnan(item.scalars[place]):
                text = f"{item.name} has no {name}; the model is told that it is not known"
                yield Finding(f"missing {name}", "warning", item.key, text, (index,))


def scalar_facts(source: Source) -> dict[str, dict[str, int | float]]:
    """Of each scalar: how many pictures lack it, and the spread of the others."""
    columns = {
        name: [item.scalars[place] for item in source.items]
        for place, name in enumerate(source.scalar_names)
    }
    known = {name: [x for x in all_ if not math.isnan(x)] for name, all_ in columns.items()}
    return {
        name: {"missing": len(columns[name]) - len(values)} | _spread(values)
        for name, values in known.items()
    }


def classes(source: Source) -> Iterator[Finding]:
    """Classes of few pictures, and of many fewer than the largest."""
    for counts in _counts_by_set(source):
        largest = max(counts.values(), default=0)
        for name, count in counts.items():
            if count < FEW:
                text = f"the class {name} has {count} picture(s); fewer than {FEW} teach little"
                yield Finding("small class", "warning", name, text)
            if largest > IMBALANCE * count:
                text = f"the class {name} has {count} picture(s), the largest {largest}"
                yield Finding("unbalanced classes", "warning", name, text)


def class_counts(source: Source) -> dict[str, int]:
    """Class name -> pictures of it, in the order of the classes; empty without classes.

    Of several label sets the names are as in `kind=cat`.
    """
    return {name: count for counts in _counts_by_set(source) for name, count in counts.items()}


def _counts_by_set(source: Source) -> Iterator[dict[str, int]]:
    if not source.label_sets:
        labels = Counter(item.label for item in source.items)
        yield {name: labels[index] for index, name in enumerate(source.class_names)}
    for place, one in enumerate(source.label_sets):
        labels = Counter(item.labels[place] for item in source.items)
        yield {f"{one.name}={name}": labels[index] for index, name in enumerate(one.classes)}


def duplicates(
    items: Sequence[Item], examined: Sequence[Examined], parts: Sequence[str]
) -> Iterator[Finding]:
    """Pictures that are the same as an earlier one: by their bytes, or else by their pixels.

    Args:
        items: all pictures, of both sets where two are compared.
        examined: what was found of each.
        parts: which part (training, held back, the other set) each belongs to; a pair that lies in two
            of them is a leak, pairs in another set than the first are not of interest.
    """
    by_bytes = _groups((index, found.digest) for index, found in enumerate(examined))
    repeated = {index for group in by_bytes for index in group[1:]}
    by_pixels = _groups(
        (index, found.pixels) for index, found in enumerate(examined) if index not in repeated
    )
    for kind, how, groups in (
        ("exact duplicate", "the same bytes as", by_bytes),
        ("same pixels", "the same pixels as", by_pixels),
    ):
        for group in groups:
            yield from _pairs(kind, how, group, items, parts)


def near_duplicates(
    items: Sequence[Item],
    examined: Sequence[Examined],
    parts: Sequence[str],
    config: PreprocessingConfig,
) -> Iterator[Finding]:
    """Pictures that look the same as an earlier one, though their pixels differ.

    Only candidates are read a second time, so memory does not hold the pictures of the set.

    Args:
        items: as for `duplicates`.
        examined: as for `duplicates`.
        parts: as for `duplicates`.
        config: how to read the candidates.
    """
    first = {found.pixels: index for index, found in reversed(list(enumerate(examined)))}
    chosen = [index for index in first.values() if examined[index].hash is not None]
    chosen.sort()
    hashes = np.array([examined[index].hash for index in chosen], dtype=np.uint64)
    candidates = [(chosen[one], chosen[other]) for one, other in close_pairs(hashes)]
    small: dict[int, np.ndarray] = {}
    for index in sorted({index for pair in candidates for index in pair}):
        try:
            small[index] = small_version(read_picture(items[index]._replace(mask=None), config))
        except DataError:  # gone since it was examined: there is nothing to compare
            continue
    same = [
        (one, other)
        for one, other in candidates
        if one in small and other in small and same_picture(small[one], small[other])
    ]
    for group in groups_of(same):
        yield from _pairs("near duplicate", "nearly the same as", group, items, parts)


def _groups(keys: Iterable[tuple[int, Hashable]]) -> list[list[int]]:
    """Indices of equal, non-empty keys, where there are several."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, key in keys:
        if key:
            groups[key].append(index)
    return [group for group in groups.values() if len(group) > 1]


def _pairs(
    kind: str, how: str, group: list[int], items: Sequence[Item], parts: Sequence[str]
) -> Iterator[Finding]:
    """Each picture of a group against the first of its part, and each part against the first one."""
    first_of: dict[str, int] = {}
    for index in group:
        earlier = first_of.setdefault(parts[index], index)
        other = items[index]
        if earlier != index and parts[index] != OTHER:
            text = f"{other.name} is {how} {items[earlier].name}"
            yield Finding(kind, "warning", other.key, text, (earlier, index))
    (part, index), *others = first_of.items()
    for other_part, other in others:
        text = (
            f"{items[other].name} ({other_part}) is {how} {items[index].name} ({part}): "
            "what is measured there is not new to the model"
        )
        severity = "warning" if kind == "near duplicate" else "error"
        yield Finding(f"leak: {kind}", severity, items[other].key, text, (index, other))


TRAINING, HELD_BACK, OTHER = "training", "held back", "the other set"
"""The parts that pictures can belong to."""


def facts(source: Source, examined: Sequence[Examined]) -> dict[str, Any]:
    """What the pictures are, in counts: formats, channels, bits, sides, captions, classes."""
    looks = [found.look for found in examined if found.look]
    lengths = [len(line) for item in source.items for line in item.caption.splitlines() if line]
    return {
        "formats": dict(Counter(look.format for look in looks).most_common()),
        "channels": {str(key): n for key, n in Counter(map(_channels, looks)).most_common()},
        "bits": {str(key): n for key, n in Counter(map(_bits, looks)).most_common()},
        "shorter_side_pixels": _spread([min(look.width, look.height) for look in looks]),
        "captions": {
            "count": len(lengths),
            "characters": _spread(lengths),
            f"longer_than_{LONG_CAPTION}": sum(length > LONG_CAPTION for length in lengths),
        },
        "classes": class_counts(source),
        "scalars": scalar_facts(source),
    }


def _spread(numbers: Sequence[int | float]) -> dict[str, int | float]:
    if not numbers:
        return {}
    middle = statistics.median(numbers)
    return {"min": min(numbers), "median": middle, "max": max(numbers)}
