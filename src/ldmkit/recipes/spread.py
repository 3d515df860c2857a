"""`ldmkit spread`: samples that were told the same in, how sure the model is of each pixel out."""

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from io import BufferedIOBase
from typing import Any, NamedTuple

from ldmkit.assembly import autoencoder_facts, load_autoencoder, require_same_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.configs import STREAM
from ldmkit.durable import sweep_temporaries, write_text
from ldmkit.errors import DataError
from ldmkit.facts import AutoencoderFacts
from ldmkit.measures_configs import SpreadConfig
from ldmkit.metrics.spread import RunningSpread
from ldmkit.output.formats import units_of
from ldmkit.output.maps import over_channels, require_formats, white_of, write_map, write_picture
from ldmkit.output.threads import read_ahead
from ldmkit.pixels import OneImage
from ldmkit.sample_blocks import (
    Block,
    count_samples,
    decoded,
    picture_name,
    read_sample_stream,
    read_samples,
    words_of,
)
from ldmkit.terminal import say, track
from ldmkit.training.runtime import groups_of, pick_device

SCHEMA_VERSION = 1
SUMMARY = "spread.json"


class Sample(NamedTuple):
    """One decoded sample."""

    number: int
    """In the whole stream."""
    seed: int
    told: dict[str, Any]
    image: OneImage


class Group(NamedTuple):
    """Samples that are reduced together."""

    name: str
    """Of the maps, without suffix: that of the first sample's picture."""
    told: list[dict[str, Any]]
    """Each once."""
    seeds: list[int]
    spread: RunningSpread


def spread(config: SpreadConfig, stream: BufferedIOBase | None = None) -> dict[str, Any]:
    """Write mean and standard deviation of each group of samples, and a summary, OUT/spread.json.

    Pictures go by one at a time: what is held is two pictures in float64 for each group, and with
    `config.every` for one group.

    Args:
        config: which samples, decoded by what, to where.
        stream: where the bytes come from if `config.samples` is `-`.

    Returns:
        The summary: `{"schema_version", "out", "autoencoder", "diffusion", "units", "white", "groups"}`;
        each group has name, told, seeds, mean_std and max_std (over pixels, root mean square over
        channels, in units of the training pictures) and files.

    Raises:
        DataError: the samples are not of this autoencoder, damaged, too few, or do not divide by `every`.
        UsageError: a format needs a package that is missing.
    """
    source = "standard input" if config.samples == STREAM else str(config.samples)
    device = pick_device(config.device)
    facts = autoencoder_facts(config.ae)
    require_formats(config.format, facts)
    model = load_autoencoder(config.ae, device)
    found: list[dict[str, Any]] = []
    reading = read_sample_stream(stream, source) if stream else read_samples(config.samples)
    with closing(read_ahead(reading)) as blocks:
        first = next(blocks, None)
        if first is None or not first.facts.total:
            raise DataError(f"{source} holds no samples")
        require_same_autoencoder(first.facts.autoencoder, config.ae, f"the samples in {source}")
        total = first.facts.total if stream else count_samples(config.samples)
        if config.every and total % config.every:
            raise DataError(
                f"{source} holds {total} samples, which --every {config.every} does not divide"
            )
        config.out.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(config.out)
        open_groups: dict[str, Group] = {}
        names = set[str]()
        with track("spread", total, unit="sample") as progress:
            for one in decoded_samples(itertools.chain([first], blocks), model, config):
                key = place_of(one, config.every)
                if key in open_groups:
                    take_in(open_groups[key], one)
                else:
                    open_groups[key] = begun(one, names, source)
                if len(open_groups[key].seeds) == config.every:
                    found.append(written(open_groups.pop(key), config, facts))
                progress.advance()
    require_several(open_groups, source)
    found += [written(group, config, facts) for group in open_groups.values()]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "out": str(config.out),
        "autoencoder": facts.fingerprint,
        "diffusion": first.facts.diffusion,
        "units": list(units_of(facts)),
        "white": white_of(facts, config.white),
        "groups": found,
    }
    write_text(config.out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    say(f"{len(found)} groups of {total} samples in {config.out}")
    return summary


def decoded_samples(
    blocks: Iterator[Block], model: Autoencoder, config: SpreadConfig
) -> Iterator[Sample]:
    """Every sample as a picture, in order."""
    number = 0
    for block in blocks:
        for rows, kept in groups_of(len(block.seeds), config.batch_size, model.device):
            images = decoded(block, block.latents[rows], rows, kept, model)
            for row, image in zip(rows.tolist(), images, strict=False):
                if not image.isfinite().all():
                    raise DataError(
                        f"sample {block.seeds[row]} has no finite numbers: retrain the model"
                    )
                yield Sample(number, block.seeds[row], block.told[row], image)
                number += 1


def place_of(one: Sample, every: int | None) -> str:
    """What the samples of a group have in common."""
    return str(one.number // every) if every else json.dumps(one.told, sort_keys=True)


def begun(one: Sample, names: set[str], source: str) -> Group:
    """A group of one; its name is added to `names`.

    Raises:
        DataError: another group has it already, whose files it would take.
    """
    name = picture_name(one.seed, words_of(one.told))
    if name in names:
        raise DataError(
            f"{source} holds two groups of the name {name}; give samples seeds of their own"
        )
    names.add(name)
    return Group(name, [one.told], [one.seed], RunningSpread(one.image))


def take_in(group: Group, one: Sample) -> None:
    """One more.

    Raises:
        DataError: its picture has another size.
    """
    if one.image.shape != group.spread.mean.shape:
        raise DataError(f"sample {one.seed} has another size than those it belongs to")
    group.spread.add(one.image)
    group.seeds.append(one.seed)
    if one.told not in group.told:
        group.told.append(one.told)


def written(group: Group, config: SpreadConfig, facts: AutoencoderFacts) -> dict[str, Any]:
    """Write the maps of a group; returns what the summary says of it."""
    low, high = units_of(facts)
    mean, std = group.spread.mean.float(), group.spread.std.float()
    stem, white = config.out / group.name, white_of(facts, config.white)
    grey = over_channels(std).double() * ((high - low) / 2.0)
    files = [
        *write_picture(stem.with_name(f"{stem.name}.mean"), mean, config.format, facts),
        *write_map(stem.with_name(f"{stem.name}.std"), std, config.format, facts, white),
    ]
    return {
        "name": group.name,
        "told": group.told,
        "seeds": group.seeds,
        "mean_std": float(grey.mean()),
        "max_std": float(grey.max()),
        "files": files,
    }


def require_several(groups: dict[str, Group], source: str) -> None:
    """Check that no sample is alone.

    Raises:
        DataError: one is; a standard deviation takes two.
    """
    for group in groups.values():
        if len(group.seeds) == 1:
            words = words_of(group.told[0]) or "the same"
            raise DataError(
                f"{source} holds a single sample that was told {words} (seed {group.seeds[0]}): draw more of "
                "each (sample --num), or group them in their order with --every"
            )


def as_text(report: dict[str, Any]) -> str:
    """The directory, for a shell."""
    return str(report["out"])
