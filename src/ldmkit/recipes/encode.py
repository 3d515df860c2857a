"""`ldmkit encode`: pictures in, a latent set out, once."""

from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import torch

from ldmkit.assembly import autoencoder_facts, load_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.tiling import compute_in_tiles
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.configs import STREAM, EncodeConfig
from ldmkit.container import file_digest, read_header
from ldmkit.data.gaps import fill_gaps
from ldmkit.data.images import read_images, say_what_is_clipped
from ldmkit.data.latents import (
    STORED_DTYPES,
    build_manifest,
    items_digest,
    moments_of,
    shard_name,
    shard_tensors,
)
from ldmkit.data.pictures import Picture
from ldmkit.data.sources import Item, open_source
from ldmkit.durable import sweep_temporaries
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts, Facts, Manifest, ShardEntry, ShardFacts, validated
from ldmkit.manifest import MANIFEST, read_manifest, write_manifest
from ldmkit.modelfile import load, save, write_message
from ldmkit.terminal import Track, say, track
from ldmkit.training.runtime import pick_device


class Shard(NamedTuple):
    """One shard before it is written."""

    tensors: dict[str, torch.Tensor]
    facts: ShardFacts


def encode(config: EncodeConfig, stream: BufferedIOBase | None = None) -> Path | None:
    """Encode a data set; shards that are already there are kept, so the same call again resumes.

    Args:
        config: what to encode, with what, to where.
        stream: where the bytes go if `config.out` is `-`: one message a shard, then the manifest.

    Returns:
        The directory of the set; None if it was streamed.

    Raises:
        DataError: a picture cannot be used (beyond `max_bad`), or OUT holds a set made differently.
        UsageError: `config.out` is `-` and there is no stream.
    """
    if config.out == STREAM and stream is None:
        raise UsageError("out is `-`, and no stream was given to write to")
    facts = autoencoder_facts(config.ae)
    preprocessing = encoding_preprocessing(config, facts)
    source = open_source(config.data)
    recipe = {
        "autoencoder": facts.fingerprint,
        "preprocessing": preprocessing.model_dump(mode="json", exclude_none=True),
        "dtype": config.dtype,
        "shard_size": config.shard_size,
        "tile": config.tile if config.tile and config.tiling == "independent" else None,
        "items": items_digest(source.items),
    }
    if stream is None and _committed(config.out, recipe, force=config.force):
        say(f"{config.out} is complete")
        return config.out

    say_what_is_clipped(source.items, preprocessing)
    device = pick_device(config.device)
    model = load_autoencoder(config.ae, device)
    if config.tile:
        compute_in_tiles(model, config.tile, exact=config.tiling == "exact", scratch=config.scratch)
    written: list[tuple[ShardEntry, ShardFacts]] = []
    allowed = int(config.max_bad * len(source.items))
    with track("encode", len(source.items), unit="picture") as progress:
        for number, start in enumerate(range(0, len(source.items), config.shard_size)):
            items = source.items[start : start + config.shard_size]
            path = config.out / shard_name(number)
            shard_facts = _kept(path, recipe, start) if stream is None else None
            if shard_facts is None:
                shard = _encode_shard(model, items, start, recipe, config, preprocessing, progress)
                shard_facts = shard.facts
                dump = shard_facts.model_dump(mode="json")
                if stream is not None:
                    write_message(stream, shard.tensors, kind="latents", config={}, facts=dump)
                else:
                    save(path, shard.tensors, kind="latents", config={}, facts=dump)
            else:
                progress.advance(len(items))
            written.append((_entry(path, shard_facts, stream is not None), shard_facts))
            skipped = [pair for _, done in written for pair in done.skipped]
            if len(skipped) > allowed:
                raise DataError(
                    f"{skipped[-1][1]} (to leave out unreadable pictures: --max-bad 0.01)"
                )

    size = preprocessing.size // facts.factor
    manifest = build_manifest(
        recipe,
        source.class_names,
        (facts.latent_channels, size, size),
        written,
        noisy=model.is_noisy,
    )
    _report(manifest)
    if stream is not None:
        write_message(
            stream, {}, kind="manifest", config={}, facts=manifest.model_dump(mode="json")
        )
        return None
    write_manifest(config.out, manifest)
    return config.out


def encoding_preprocessing(config: EncodeConfig, facts: AutoencoderFacts) -> PreprocessingConfig:
    """The autoencoder's own preprocessing, without randomness, at the size asked for.

    Raises:
        DataError: the size is not a multiple of the autoencoder's factor.
    """
    size = config.size or facts.preprocessing.size
    if size % facts.factor:
        raise DataError(
            f"--size {size} is not a multiple of the autoencoder's factor {facts.factor}"
        )
    return facts.preprocessing.model_copy(update={"size": size, "crop": "center", "flip": False})


def _committed(out: Path, recipe: Facts, *, force: bool) -> bool:
    """Whether the set is there and was made in this very way; with `force`, another one is removed."""
    sweep_temporaries(out)
    manifest = out / MANIFEST
    shards = sorted(out.glob("*.safetensors"))
    committed = None
    if manifest.exists():
        committed = read_manifest(out)
        stored = committed.recipe
    elif shards:
        stored = validated(ShardFacts, read_header(shards[0]).facts, str(shards[0])).recipe
    else:
        return False
    changed = [name for name in recipe if stored.get(name) != recipe[name]]
    if not changed:
        return committed is not None and all(
            (out / entry.name).is_file() for entry in committed.shards
        )
    if not force:
        raise DataError(
            f"{out} holds latents made with another {changed[0]} ({stored.get(changed[0])}, now "
            f"{recipe[changed[0]]}): give another --out, or --force to replace them"
        )
    for path in (manifest, *shards):  # the manifest first: without it the set counts for nothing
        path.unlink(missing_ok=True)
    return False


def _kept(path: Path, recipe: Facts, start: int) -> ShardFacts | None:
    """The facts of a shard that an earlier call finished, if its bytes hold."""
    if not path.exists():
        return None
    try:
        header, _ = load(path, kind="latents")
    except DataError as error:
        say(f"encoding again: {error}")
        return None
    facts = validated(ShardFacts, header.facts, str(path))
    return facts if facts.recipe == recipe and facts.start == start else None


@torch.inference_mode()
def _encode_shard(
    model: Autoencoder,
    items: list[Item],
    start: int,
    recipe: Facts,
    config: EncodeConfig,
    preprocessing: PreprocessingConfig,
    progress: Track,
) -> Shard:
    device = model.device
    means, stds, kept, skipped = [], [], [], []
    batch_size = 1 if config.tile else config.batch_size
    for batch_start in range(0, len(items), batch_size):
        batch = items[batch_start : batch_start + batch_size]
        readable, images = [], []
        for item, picture in _readable(batch, preprocessing):
            if isinstance(picture, DataError):
                skipped.append((item.key, str(picture)))
                if config.max_bad == 0:
                    raise picture
            else:
                readable.append(item)
                images.append(picture)
        if images:
            posterior = model.encode(fill_gaps(torch.stack(images)).images.to(device))
            means.append(posterior.mean.cpu().to(STORED_DTYPES[config.dtype]))
            if posterior.std is not None:
                stds.append(posterior.std.cpu().to(STORED_DTYPES[config.dtype]))
            kept += readable
        progress.advance(len(batch))
    size = preprocessing.size // model.config.factor
    none = torch.empty(0, model.latent_channels, size, size, dtype=STORED_DTYPES[config.dtype])
    mean = torch.cat([none, *means])
    std = torch.cat([none, *stds]) if model.is_noisy else None
    tensors = shard_tensors(mean, std, kept)
    facts = ShardFacts(
        fingerprint="",
        recipe=recipe,
        start=start,
        stop=start + len(items),
        skipped=tuple(skipped),
        moments=moments_of(mean, std),
    )
    return Shard(tensors, facts)


def _readable(
    items: list[Item], preprocessing: PreprocessingConfig
) -> Iterator[tuple[Item, Picture | DataError]]:
    for item in items:
        try:
            yield item, read_images([item], preprocessing)[0]
        except DataError as error:
            yield item, error


def _entry(path: Path, facts: ShardFacts, streaming: bool) -> ShardEntry:
    count = facts.stop - facts.start - len(facts.skipped)
    size, digest = (0, "") if streaming else (path.stat().st_size, file_digest(path))
    return ShardEntry(
        name=path.name, start=facts.start, stop=facts.stop, count=count, bytes=size, sha256=digest
    )


def _report(manifest: Manifest) -> None:
    means = ", ".join(f"{value:.3f}" for value in manifest.whitening.mean)
    stds = ", ".join(f"{value:.3f}" for value in manifest.whitening.std)
    say(
        f"{manifest.count} latents of {manifest.latent_shape}; per channel mean {means}; std {stds}"
    )
    for key, reason in manifest.skipped[:10]:
        say(f"left out {key}: {reason}")
    if len(manifest.skipped) > 10:
        say(f"... and {len(manifest.skipped) - 10} more, listed in {MANIFEST}")
