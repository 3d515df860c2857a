"""`ldmkit encode`: pictures in, a latent set out, once."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from io import BufferedIOBase
from pathlib import Path

from ldmkit.assembly import (
    autoencoder_facts,
    load_autoencoder,
    precision_for,
    preprocessing_of,
)
from ldmkit.autoencoder.latent_shards import Fill, Work, bytes_of, encode_shards
from ldmkit.autoencoder.tiling import compute_in_tiles
from ldmkit.conditioning.mask import Convention, fill_hole
from ldmkit.configs import STREAM
from ldmkit.data.buckets import bucket_shapes, sorted_into_buckets
from ldmkit.data.encoding import (
    Companions,
    Holes,
    LowResolution,
    Task,
    ViewSettings,
    plan_shards,
)
from ldmkit.data.former_set import (
    former_manifest,
    items_of,
    items_to_add,
    kept_shard,
    remove_other,
    streamed_shard,
    written_shard,
)
from ldmkit.data.images import say_what_is_clipped
from ldmkit.data.items import Item, Source
from ldmkit.data.latents import WrittenShard, build_manifest, shard_name
from ldmkit.data.masks import SMALLEST_SIDE
from ldmkit.data.sources import open_source
from ldmkit.data.tally import lines_of
from ldmkit.data_configs import EncodeConfig, HoleFill
from ldmkit.durable import require_room, sweep_temporaries
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts, Facts, Manifest, ShardFacts
from ldmkit.manifest import MANIFEST, write_manifest
from ldmkit.modelfile import save, write_message
from ldmkit.ownership import owned
from ldmkit.terminal import say, track
from ldmkit.towers import Towers, towers_of
from ldmkit.training.runtime import pick_device, settled

CONVENTIONS: dict[HoleFill, Convention] = {"black": "ldm", "grey": "sd"}


def encode(config: EncodeConfig, stream: BufferedIOBase | None = None) -> Path | None:
    """Encode a data set; shards that are already there are kept, so the same call again resumes.

    Args:
        config: what to encode, with what, to where.
        stream: where the bytes go if `config.out` is `-`: one message a shard, then the manifest.

    Returns:
        The directory of the set; None if it was streamed. With several jobs the set is finished, and
        has its manifest, when the last of them ends.

    Raises:
        DataError: a picture cannot be used (beyond `max_bad`), or OUT holds a set made differently.
        UsageError: `config.out` is `-` and there is no stream.
    """
    if stream is not None:
        return _encoded(config, stream)
    if config.out == STREAM:
        raise UsageError("out is `-`, and no stream was given to write to")
    job, jobs = job_of(config)
    with owned(config.out, f"-{job}-of-{jobs}" if jobs > 1 else ""):
        return _encoded(config, None)


def _encoded(config: EncodeConfig, stream: BufferedIOBase | None) -> Path | None:
    """The set, or its stream; no other process writes to the directory."""
    job, jobs = job_of(config)
    facts = autoencoder_facts(config.ae)
    source = open_source(config, max_bad=config.max_bad)
    towers = towers_of(config, facts, source)
    work = plan_work(config, facts, source, towers)
    tasks = plan_tasks(config, work, source.items)
    former: Manifest | None = None
    before: list[str] = []  # shards that this call adds to
    if stream is None:
        if config.force:
            remove_other(config.out, work.recipe, tasks)
        former = former_manifest(config.out, work.recipe)
        for name in ["*"] if jobs == 1 else [shard_name(t.number) for t in tasks[job - 1 :: jobs]]:
            sweep_temporaries(config.out, name)
    if former is not None and (config.add or former.items != items_of(tasks)):
        source = items_to_add(source, former, config.out)
        if source.items and not config.add:
            raise DataError(
                f"{config.out} lacks {len(source.items)} of the pictures in DATA, the first of them "
                f"{source.items[0].key}: --add appends them, --force encodes all anew"
            )
        tasks = plan_tasks(config, work, source.items, former)
        before = [entry.name for entry in former.shards]
    if former is not None and all(path_of(config, task).is_file() for task in tasks):
        say(f"{config.out} is complete")
        return config.out

    say_what_is_clipped(source.items, work.preprocessing)
    mine = tasks[job - 1 :: jobs]
    kept = {} if stream else kept_shards(config, work, mine)
    todo = [task for task in mine if task.number not in kept]
    if stream is None:
        require_room(config.out, bytes_of(config, facts, items_in(todo)), "the shards to come")
    precision = work.recipe["precision"] or "fp32"
    model = load_autoencoder(config.ae, pick_device(config.device), precision) if todo else None
    if model is not None and config.tile:
        exact = config.tiling == "exact"
        compute_in_tiles(model, config.tile, exact=exact, scratch=config.scratch)
    written: list[WrittenShard] = []
    with track(
        "encode", items_in(mine), done=items_in(mine) - items_in(todo), unit="picture"
    ) as bar:
        for task, shard in encode_shards(model, todo, work, config, bar) if model else ():
            dump = shard.facts.model_dump(mode="json")
            if stream is not None:
                write_message(stream, shard.tensors, kind="latents", config={}, facts=dump)
                written.append(streamed_shard(shard_name(task.number), shard.tensors, shard.facts))
            else:
                save(path_of(config, task), shard.tensors, kind="latents", config={}, facts=dump)

    if stream is None:
        there = sum(path_of(config, task).is_file() for task in tasks)
        if there < len(tasks):
            say(
                f"{there} of {len(tasks)} shards are there; the job that comes last adds the manifest"
            )
            return config.out
        names = [shard_name(task.number) for task in tasks]
        written = [written_shard(config.out / name, work.recipe) for name in (*before, *names)]
    size = work.preprocessing.size // facts.factor
    manifest = build_manifest(
        work.recipe,
        source,
        (facts.latent_channels, size, size),
        written,
    )
    report(manifest)
    if stream is not None:
        dump = manifest.model_dump(mode="json")
        write_message(stream, {}, kind="manifest", config={}, facts=dump)
        return None
    write_manifest(config.out, manifest)
    return config.out


def job_of(config: EncodeConfig) -> tuple[int, int]:
    """Which job this is, from 1, and of how many: as asked for, or a process of torchrun.

    Raises:
        UsageError: several jobs would replace each other's work.
    """
    part, count = 1, 1
    if config.jobs is not None:
        part, count = (int(number) for number in config.jobs.split("/"))
    elif config.out != STREAM and "WORLD_SIZE" in os.environ:
        part, count = int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"])
    if count > 1 and config.force:
        raise UsageError(
            "--force and several jobs would remove each other's shards: remove OUT first"
        )
    return part, count


def plan_work(
    config: EncodeConfig, facts: AutoencoderFacts, source: Source, towers: Towers
) -> Work:
    """What decides the bytes of every shard.

    Raises:
        DataError: the size is not a multiple of the autoencoder's factor.
        UsageError: a bucket or a low-resolution picture would have no whole size, or a picture is too
            small for a random hole.
    """
    preprocessing = preprocessing_of(facts, config.size)
    if config.buckets and config.bucket_step % facts.factor:
        raise UsageError(
            f"--bucket-step {config.bucket_step} is no multiple of the autoencoder's factor "
            f"{facts.factor}"
        )
    step = config.bucket_step if config.buckets else preprocessing.size
    if config.lowres and step % config.lowres:
        raise UsageError(f"--lowres {config.lowres} does not divide {step}, a side of the pictures")
    if config.keep_pictures and facts.depth != "uint8":
        raise UsageError(
            f"--keep-pictures stores 8 bits, and the autoencoder saw {facts.depth}: leave it out"
        )
    if config.holes not in (None, "given") and step < SMALLEST_SIDE:
        raise UsageError(
            f"--holes {config.holes} needs sides of {SMALLEST_SIDE} pixels, and pictures have {step}"
        )
    views = ViewSettings(
        config.views, config.view_flip, config.view_zoom, config.view_jitter, config.seed
    )
    columns = {
        "boxes": bool(source.box_names),
        "labelmap": any(item.labelmap for item in source.items),
        "mask": any(item.mask for item in source.items),
        "lowres": config.lowres > 0,
        "labels": bool(source.label_sets),
        "scalars": config.scalars is not None,
        "hole": config.holes is not None,
        "masked": config.holes is not None,
        "image": config.keep_pictures,
    }
    stored = sorted([*towers.recipes, *(name for name, there in columns.items() if there)])
    lowres = None
    if config.lowres:
        lowres = LowResolution(config.lowres, config.lowres_degradation, config.seed, facts.depth)
    holes = Holes(config.holes, config.seed) if config.holes else None
    fill: Fill | None = None
    if holes is not None:
        fill = partial(fill_hole, convention=CONVENTIONS[config.hole_fill])
    device = pick_device(config.device)
    in_bfloat16 = settled(precision_for(facts, config.precision), device) == "bf16"
    recipe = {
        "autoencoder": facts.fingerprint,
        "preprocessing": preprocessing.model_dump(mode="json", exclude_none=True),
        "dtype": config.dtype,
        "shard_size": config.shard_size,
        "tile": config.tile if config.tile and config.tiling == "independent" else None,
        "views": views._asdict() if config.views > 1 else None,
        "buckets": [config.bucket_step, config.bucket_ratio] if config.buckets else None,
        "lowres": lowres_recipe(lowres),
        "columns": stored,
        **recipe_of_columns(config, source, holes),
        "precision": "bf16" if in_bfloat16 and not config.tile else None,
        **towers.recipes,
    }
    companions = Companions(lowres, holes)
    made = (towers.texts, fill, towers.pictures)
    return Work(recipe, preprocessing, views, frozenset(stored), facts.depth, companions, *made)


def recipe_of_columns(config: EncodeConfig, source: Source, holes: Holes | None) -> Facts:
    """What decides the bytes of the columns that conditions need; nothing of those not asked for."""
    recipe: Facts = {}
    if source.label_sets:
        recipe["labels"] = [one.name for one in source.label_sets]
    if source.labelmap_colours:
        rows = [one.model_dump(mode="json") for one in source.labelmap_colours]
        recipe["labelmap_colours"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    if config.scalars is not None:
        recipe["scalars"] = list(config.scalars)
    if holes is not None:
        seed = {} if holes.kind == "given" else {"seed": holes.seed}
        recipe["holes"] = {"kind": holes.kind, "fill": config.hole_fill, **seed}
    return recipe


def lowres_recipe(lowres: LowResolution | None) -> int | dict[str, int | str] | None:
    """What a set says of its low-resolution pictures: the ratio, and more where chance had a part."""
    if lowres is None:
        return None
    if lowres.degradation == "bicubic":
        return lowres.ratio
    return {"ratio": lowres.ratio, "degradation": lowres.degradation, "seed": lowres.seed}


def plan_tasks(
    config: EncodeConfig, work: Work, items: Sequence[Item], former: Manifest | None = None
) -> list[Task]:
    """The shards to make for some items, to come after those of a former set."""
    size = work.preprocessing.size
    parts = [((size, size), items)]
    if config.buckets:
        shapes = bucket_shapes(size, config.bucket_step, config.bucket_ratio)
        parts = sorted_into_buckets(items, shapes, work.preprocessing)
    return plan_shards(
        parts,
        config.shard_size,
        first_number=len(former.shards) if former else 0,
        first_item=former.shards[-1].stop if former else 0,
    )


def kept_shards(config: EncodeConfig, work: Work, tasks: Sequence[Task]) -> dict[int, ShardFacts]:
    """The shards that need not be made again, by number."""
    found = ((task, kept_shard(path_of(config, task), work.recipe, task)) for task in tasks)
    return {task.number: facts for task, facts in found if facts is not None}


def items_in(tasks: Sequence[Task]) -> int:
    """How many pictures some shards cover."""
    return sum(len(task.items) for task in tasks)


def path_of(config: EncodeConfig, task: Task) -> Path:
    """Where a shard lies."""
    return config.out / shard_name(task.number)


def report(manifest: Manifest) -> None:
    """Say what the set is, what was left out of it, and what decoding changed."""
    means = ", ".join(f"{value:.3f}" for value in manifest.whitening.mean)
    stds = ", ".join(f"{value:.3f}" for value in manifest.whitening.std)
    say(
        f"{manifest.count} latents of {manifest.latent_shape}; per channel mean {means}; std {stds}"
    )
    for line in lines_of(manifest.converted):
        say(line)
    for key, reason in manifest.skipped[:10]:
        say(f"left out {key}: {reason}")
    if len(manifest.skipped) > 10:
        say(f"... and {len(manifest.skipped) - 10} more, listed in {MANIFEST}")
