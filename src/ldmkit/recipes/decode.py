"""`ldmkit decode`: sampled latents in, pictures out."""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmkit.assembly import autoencoder_facts, load_autoencoder, require_same_autoencoder
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.tiling import compute_in_tiles
from ldmkit.conditioning.mask import blended
from ldmkit.configs import STREAM
from ldmkit.data.tar_members import END
from ldmkit.decode_configs import DecodeConfig, PictureFormat
from ldmkit.durable import atomic_file, sweep_temporaries
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts
from ldmkit.modelfile import versions
from ldmkit.output.contact_sheet import MAX_PICTURES, Thumbnail, contact_sheet, thumbnail
from ldmkit.output.formats import (
    FORMATS,
    Note,
    choose_format,
    encode_picture,
    pixels_of_file,
    units_of,
)
from ldmkit.output.listing import Entry, Listing, line_of
from ldmkit.output.provenance import KEY, Provenance, as_text, provenance_of
from ldmkit.output.tar import tar_member
from ldmkit.output.threads import in_order, read_ahead
from ldmkit.pixels import OneImage, save_png
from ldmkit.sample_blocks import Block, read_sample_stream, read_samples, words_of
from ldmkit.terminal import say, track
from ldmkit.training.runtime import groups_of, pick_device

RECORD_VERSION = 1


class Picture(NamedTuple):
    """One picture on its way to a file."""

    number: int
    """Of the sample, in the whole stream."""
    name: str
    """Of the file, without suffix."""
    told: dict[str, Any]
    record: Provenance
    shown: bool
    """Whether it stands in the sheet."""
    image: OneImage | None
    """None where its file is there already."""


class Written(NamedTuple):
    """What is left of a picture once it is encoded, and in the directory if it goes there."""

    number: int
    name: str
    record: Provenance
    sha256: str
    data: bytes
    small: Thumbnail | None


class Manner(NamedTuple):
    """What is known before the first sample is read."""

    config: DecodeConfig
    format: PictureFormat
    facts: AutoencoderFacts
    device: torch.device
    source: str
    """How to call the samples in errors."""

    def path(self, name: str) -> Path:
        """Where the picture of that name lies."""
        return self.config.out / f"{name}.{FORMATS[self.format].suffix}"


def decode(
    config: DecodeConfig,
    stream: BufferedIOBase | None = None,
    output: BufferedIOBase | None = None,
) -> Path | None:
    """Decode samples to files named by seed and what was told, and a sheet of the first 256.

    Args:
        config: what to decode, with what, to where.
        stream: where the bytes come from if `config.samples` is `-`.
        output: where the tar goes if `config.tar` is `-`.

    Returns:
        The directory of the pictures, or the tar; None if it was streamed.

    Raises:
        DataError: the samples are not of this autoencoder, are damaged, or the stream ended early.
        UsageError: the format cannot hold the autoencoder's channels, or there is no stream.
    """
    if config.tar == STREAM and output is None:
        raise UsageError("tar is `-`, and no stream was given to write to")
    source = "standard input" if config.samples == STREAM else str(config.samples)
    device = pick_device(config.device)
    facts = autoencoder_facts(config.ae)
    manner = Manner(config, choose_format(config.format, facts), facts, device, source)
    model = load_autoencoder(config.ae, device)
    if config.tile:
        compute_in_tiles(model, config.tile, exact=config.tiling == "exact", scratch=config.scratch)
    if config.tar is None:
        config.out.mkdir(parents=True, exist_ok=True)
        if config.part == (1, 1):  # else what is unfinished may be another job's at work
            sweep_temporaries(config.out)
    small: dict[int, Thumbnail] = {}  # by number: what is there already comes before its time
    written = 0
    with ExitStack() as stack:
        reading = read_sample_stream(stream, source) if stream else read_samples(config.samples)
        blocks = stack.enter_context(closing(read_ahead(reading)))
        first = next(blocks, None)
        if first is None or not first.facts.total:
            raise DataError(f"{source} holds no samples")
        require_same_autoencoder(first.facts.autoencoder, config.ae, f"the samples in {source}")
        if config.feather and first.inpainted is None:
            raise UsageError(f"--feather: the samples in {source} carry no pictures with holes")
        mine = share_of(first.facts.total, config.part)
        listing, add = None, None
        if config.tar is None:
            listing = stack.enter_context(Listing(config.out, config.part))
        else:
            add = stack.enter_context(_tar(manner, config.tar, output))
        progress = stack.enter_context(track("decode", len(mine), unit="picture"))
        pictures = _pictures(_whole(first, blocks, source), mine, model, manner, listing)
        ahead = max(2 * config.writers, config.batch_size)
        for one in in_order(lambda x: _write(x, manner), pictures, config.writers, ahead):
            if add is not None:
                add(one)
            elif listing is not None and config.provenance:
                listing.add(manner.path(one.name).name, one.record, one.sha256)
            if one.small is not None:
                small[one.number] = one.small
            written += 1
            progress.advance()
    place = config.out if config.tar is None else config.tar
    sheet = _sheet_path(config)
    if small and sheet is not None:
        pixels = contact_sheet(
            [small[number] for number in sorted(small)],
            columns=config.columns,
            by_group=config.grid == "by-class",
            labels=config.labels,
        )
        with atomic_file(sheet) as temporary:
            save_png(temporary, pixels)
    say(f"{written} pictures{f' and {sheet.name}' if small and sheet else ''} in {place}")
    return None if place == STREAM else place


def picture_name(seed: int, words: str) -> str:
    """File name of a picture without suffix: seed and what it was told, of safe characters only.

    Args:
        seed: of the sample.
        words: what it was told.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[:60].strip("-")
    return f"{seed:06d}-{slug}" if slug else f"{seed:06d}"


def share_of(total: int, part: tuple[int, int]) -> range:
    """The numbers of the samples that a part of the job decodes: fixed ranges that cover all once."""
    number, parts = part
    return range(total * (number - 1) // parts, total * number // parts)


def _whole(first: Block, others: Iterator[Block], source: str) -> Iterator[Block]:
    """All blocks; that they are as many samples as the first one says is checked at the end."""
    yield first
    seen = len(first.seeds)
    for block in others:
        yield block
        seen += len(block.seeds)
    if seen != first.facts.total:
        raise DataError(f"{source} ended after {seen} of {first.facts.total} samples")


def _pictures(
    blocks: Iterator[Block],
    mine: range,
    model: Autoencoder,
    manner: Manner,
    listing: Listing | None,
) -> Iterator[Picture]:
    """The pictures to write, decoded in groups, and those that are there already."""
    start, names = 0, set[str]()
    for block in blocks:
        todo: list[tuple[int, Picture]] = []
        for row in range(len(block.seeds)):
            if start + row not in mine:
                continue
            picture = _picture(block, row, start + row, mine, manner)
            if picture.name in names:
                raise DataError(f"{manner.source} holds two samples of the name {picture.name}")
            names.add(picture.name)
            if listing is not None and manner.config.resume and _there(picture, manner, listing):
                yield picture
            else:
                todo.append((row, picture))
        start += len(block.seeds)
        for group, kept in _groups(len(todo), manner):
            rows = torch.tensor([todo[place][0] for place in group])
            for place, image in zip(
                group, _decoded(block, rows, kept, model, manner), strict=False
            ):
                picture = todo[int(place)][1]
                if listing is not None:
                    listing.forget(manner.path(picture.name).name)
                yield picture._replace(image=image)


def _picture(block: Block, row: int, number: int, mine: range, manner: Manner) -> Picture:
    config, told = manner.config, block.told[row]
    shown = number - mine.start < MAX_PICTURES and _sheet_path(config) is not None
    decoded: dict[str, Any] = {"format": manner.format}
    if manner.format in ("jpg", "webp"):
        decoded["quality"] = config.quality
    if config.tile and config.tiling == "independent":
        decoded["tile"] = config.tile
    if block.inpainted is not None:
        decoded["feather"] = config.feather
    record = {
        KEY: RECORD_VERSION,
        "seed": block.seeds[row],
        "told": told,
        "diffusion": block.facts.diffusion,
        "autoencoder": manner.facts.fingerprint,
        "manner": block.facts.manner,
        "decoded": decoded,
        "latents": block.digests[row],
        "versions": {"sampled": block.facts.versions, "decoded": versions()},
    }
    name = picture_name(block.seeds[row], words_of(told))
    return Picture(number, name, told, record, shown, None)


def _there(picture: Picture, manner: Manner, listing: Listing) -> bool:
    """Whether the picture's file is there and was made of the same, by whatever versions."""
    path = manner.path(picture.name)
    if not path.is_file() or listing.is_damaged(path.name):
        return False
    try:
        carries = FORMATS[manner.format].carries_text
        found = provenance_of(path) if carries else listing.record(path.name)
    except DataError:  # not one of ours, or damaged: it is made anew
        return False
    return found is not None and as_text(found | {"versions": None}) == as_text(
        picture.record | {"versions": None}
    )


@torch.inference_mode()
def _decoded(
    block: Block, rows: Tensor, kept: int, model: Autoencoder, manner: Manner
) -> Iterator[OneImage]:
    images = model.decode(block.latents[rows].to(manner.device))[:kept].float()
    if block.inpainted is not None:
        given, holes = (x[rows[:kept]].to(manner.device) for x in block.inpainted)
        if given.shape != images.shape:
            raise DataError(
                f"{manner.source}: the pictures with holes are {list(given.shape[1:])}, and the decoded "
                f"ones {list(images.shape[1:])}; sample for the pictures' own size"
            )
        images = blended(given, images, holes, manner.config.feather)
    return iter(images.cpu())


def _groups(count: int, manner: Manner) -> Iterator[tuple[Tensor, int]]:
    """As `groups_of`; in tiles one by one, since even one picture may be large."""
    if manner.config.tile:
        return ((torch.tensor([number]), 1) for number in range(count))
    return groups_of(count, manner.config.batch_size, manner.device)


def _write(picture: Picture, manner: Manner) -> Written:
    """Encode a picture, and put it into the directory if it goes there; in any thread."""
    config, path = manner.config, manner.path(picture.name)
    units = units_of(manner.facts)
    if picture.image is not None:
        text = as_text(picture.record) if config.provenance else ""
        note = Note(text, config.quality, picture.name)
        data = encode_picture(picture.image, manner.format, units, note)
        if config.tar is None:
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
    else:
        data = path.read_bytes()
    small = None
    if picture.shown:  # of the file's bytes, so that a resumed job's sheet is the same
        pixels = pixels_of_file(data, manner.format, manner.facts.image_channels, units)
        group = str(picture.told.get("class", words_of(picture.told)))
        small = thumbnail(pixels[0], picture.name, group)
    kept = data if config.tar else b""
    sha256 = hashlib.sha256(data).hexdigest()
    return Written(picture.number, picture.name, picture.record, sha256, kept, small)


def _sheet_path(config: DecodeConfig) -> Path | None:
    if config.grid == "none" or config.tar == STREAM:
        return None
    if config.tar is not None:
        return config.tar.with_suffix(".grid.png")
    part, parts = config.part
    return config.out / ("grid.png" if parts == 1 else f"grid.{part}-of-{parts}.png")


@contextmanager
def _tar(
    manner: Manner, path: Path, output: BufferedIOBase | None
) -> Iterator[Callable[[Written], None]]:
    """What adds a picture to the tar; without an error the tar ends with its end mark."""
    with ExitStack() as stack:
        if path == STREAM and output is not None:
            file: Any = output
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(path.parent, path.name)
            file = stack.enter_context(stack.enter_context(atomic_file(path)).open("wb"))

        def add(one: Written) -> None:
            file.write(tar_member(manner.path(one.name).name, one.data))
            if manner.config.provenance:
                line = line_of(manner.path(one.name).name, Entry(one.record, one.sha256))
                file.write(tar_member(f"{one.name}.json", line.encode()))

        yield add
        file.write(END)
