"""What an earlier call left in the directory of a latent set: to keep, to go on with, or to refuse."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldmkit.container import read_header
from ldmkit.data.encoding import Task
from ldmkit.data.items import Item, Source
from ldmkit.data.latents import (
    WrittenShard,
    columns_of,
    items_digest,
    joined_digest,
    read_texts,
    shard_name,
)
from ldmkit.digests import file_digest
from ldmkit.errors import DataError
from ldmkit.facts import Facts, Manifest, ShardEntry, ShardFacts, validated
from ldmkit.manifest import MANIFEST, read_manifest
from ldmkit.modelfile import load
from ldmkit.terminal import say


def former_manifest(out: Path, recipe: Facts) -> Manifest | None:
    """The manifest of a set that is there; None where none is, or an unfinished one made as asked.

    Raises:
        DataError: what is there was made differently; the message names the difference.
    """
    manifest = read_manifest(out) if (out / MANIFEST).exists() else None
    first = next(iter(sorted(out.glob("*.safetensors"))), None)
    if manifest is not None:
        stored = manifest.recipe
    elif first is not None:
        stored = shard_facts(first).recipe
    else:
        return None
    changed = changed_setting(stored, recipe)
    if changed:
        raise DataError(
            f"{out} holds latents made with another {changed}: give another --out, or --force to "
            "replace them"
        )
    return manifest


def changed_setting(stored: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """The first setting in which two recipes differ, with both values; "" where they agree."""
    for name in wanted:
        old, new = stored.get(name), wanted[name]
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            return f"{name}.{keys[0]} ({old.get(keys[0])}, now {new.get(keys[0])})"
        return f"{name} ({old}, now {new})"
    return ""


def remove_other(out: Path, recipe: Facts, tasks: Sequence[Task]) -> None:
    """Remove what is in OUT unless it is this very set, finished or not.

    The manifest goes first: without it a set counts for nothing.
    """
    try:
        manifest = former_manifest(out, recipe)
        if manifest is not None and manifest.items == items_of(tasks):
            return
        for task in () if manifest else tasks:
            kept_shard(out / shard_name(task.number), recipe, task)
    except DataError as error:
        say(f"replacing: {error}")
    else:
        if manifest is None:
            return
    for path in (out / MANIFEST, *sorted(out.glob("*.safetensors"))):
        path.unlink(missing_ok=True)


def items_of(tasks: Sequence[Task]) -> str:
    """What the manifest of a set of just these shards says of its items."""
    return joined_digest(items_digest(task.items) for task in tasks)


def shard_facts(path: Path) -> ShardFacts:
    """What a shard says of itself.

    Raises:
        DataError: it cannot be read, or is no shard.
    """
    return validated(ShardFacts, read_header(path).facts, str(path))


def written_shard(path: Path, recipe: Facts) -> WrittenShard:
    """A shard on disk, for the manifest.

    Raises:
        DataError: it was made another way, such as by a job with other settings.
    """
    header = read_header(path)
    facts = validated(ShardFacts, header.facts, str(path))
    changed = changed_setting(facts.recipe, recipe)
    if changed:
        raise DataError(f"{path} was made with another {changed}; give all jobs the same settings")
    entry = _entry(path.name, facts, {name: e.shape for name, e in header.tensors.items()})
    entry = entry.model_copy(update={"bytes": path.stat().st_size, "sha256": file_digest(path)})
    return WrittenShard(entry, facts, columns_of(header.tensors))


def streamed_shard(name: str, tensors: Mapping[str, Tensor], facts: ShardFacts) -> WrittenShard:
    """A shard that went into a stream, for the manifest: without size and digest of a file."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return WrittenShard(_entry(name, facts, shapes), facts, columns_of(tensors))


def _entry(name: str, facts: ShardFacts, shapes: Mapping[str, tuple[int, ...]]) -> ShardEntry:
    count, z, height, width = shapes["mean"]
    return ShardEntry(
        name=name,
        shape=(z, height, width),
        start=facts.start,
        stop=facts.stop,
        count=count,
        bytes=0,
        sha256="",
    )


def kept_shard(path: Path, recipe: Facts, task: Task) -> ShardFacts | None:
    """The facts of a shard that an earlier call finished, if its bytes hold.

    Raises:
        DataError: it holds other pictures than it would now.
    """
    if not path.exists():
        return None
    try:
        header, _ = load(path, kind="latents")
    except DataError as error:
        say(f"encoding again: {error}")
        return None
    facts = validated(ShardFacts, header.facts, str(path))
    if facts.recipe != recipe:
        return None
    if (facts.start, facts.stop, facts.items) != (task.start, task.stop, items_digest(task.items)):
        raise DataError(
            f"{path} was made from other pictures than DATA holds now: give another --out, or --force "
            "to encode all anew"
        )
    return facts


def items_to_add(source: Source, manifest: Manifest, out: Path) -> Source:
    """The pictures that a committed set lacks, their labels counted on from its own.

    Raises:
        DataError: a picture that the set holds has changed since, or other pictures have its keys.
    """
    by_key = {item.key: item for item in source.items}
    held: set[str] = set()
    names = _continued(manifest.class_names, source.class_names)
    box_names = _continued(manifest.box_names, source.box_names)
    former = {one.name: one.classes for one in manifest.label_sets}
    sets = tuple(
        one.model_copy(update={"classes": _continued(former.get(one.name, ()), one.classes)})
        for one in source.label_sets
    )
    named = source._replace(class_names=names, box_names=box_names, label_sets=sets)
    by_key = {key: _renumbered(item, source, named) for key, item in by_key.items()}
    for entry in manifest.shards:
        facts = shard_facts(out / entry.name)
        keys = {*read_texts(out / entry.name, "key"), *(key for key, _ in facts.skipped)}
        present = [by_key[key] for key in sorted(keys) if key in by_key]
        if present and items_digest(present) != facts.items:
            raise DataError(
                f"{out / entry.name} holds {len(keys)} pictures, and some of these have changed or are "
                f"missing in DATA (among them {sorted(keys)[0]}): --add takes the same pictures and new "
                "ones, or new ones alone; --force encodes all anew"
            )
        held |= keys
    new = [item for key, item in by_key.items() if key not in held]
    return named._replace(items=new)


def _continued(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    return (*old, *(name for name in new if name not in old))


def _renumbered(item: Item, source: Source, named: Source) -> Item:
    """An item of `source` with the indices that `named` gives its names."""
    pairs = zip(item.labels, source.label_sets, named.label_sets, strict=True)
    boxes = tuple(
        box._replace(category=named.box_names.index(source.box_names[box.category]))
        for box in item.boxes
    )
    return item._replace(
        label=_renamed(item.label, source.class_names, named.class_names),
        labels=tuple(_renamed(label, old.classes, new.classes) for label, old, new in pairs),
        boxes=boxes,
    )


def _renamed(label: int, old: tuple[str, ...], new: tuple[str, ...]) -> int:
    return label if label < 0 else new.index(old[label])
