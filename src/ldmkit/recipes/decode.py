"""`ldmkit decode`: sampled latents in, pictures out."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.assembly import (
    autoencoder_facts,
    load_autoencoder,
    precision_for,
    require_same_autoencoder,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.tiling import compute_in_tiles
from ldmkit.configs import STREAM
from ldmkit.data.tar_members import END
from ldmkit.decode_configs import DecodeConfig
from ldmkit.durable import atomic_file, make_directory, sweep_temporaries
from ldmkit.errors import DataError, UsageError
from ldmkit.modelfile import versions
from ldmkit.networks.seamless import AXES, wrap_convolutions
from ldmkit.output.animation import MAX_PICTURES as MAX_MOVING
from ldmkit.output.animation import Frame
from ldmkit.output.contact_sheet import MAX_PICTURES, Thumbnail, contact_sheet
from ldmkit.output.formats import (
    FORMATS,
    choose_format,
)
from ldmkit.output.listing import Entry, Listing, line_of
from ldmkit.output.provenance import KEY, as_text, provenance_of
from ldmkit.output.tar import tar_member
from ldmkit.output.threads import in_order, read_ahead
from ldmkit.output.writing import Manner, Picture, Written, moving_sheet, write_picture
from ldmkit.pixels import OneImage, save_png
from ldmkit.sample_blocks import (
    Block,
    count_samples,
    decoded,
    picture_name,
    read_sample_stream,
    read_samples,
    seamless_of,
    share_of,
    words_of,
)
from ldmkit.sample_groups import sample_groups
from ldmkit.terminal import say, track
from ldmkit.training.runtime import pick_device, settled

RECORD_VERSION = 1
ANY = range(1 << 62)
"""The numbers of samples in a pipe, whose end is not known."""


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
        UsageError: the format cannot hold the autoencoder's channels, options do not go together, or there
            is no stream.
    """
    if config.tar == STREAM and output is None:
        raise UsageError("tar is `-`, and no stream was given to write to")
    source = "standard input" if config.samples == STREAM else str(config.samples)
    device = pick_device(config.device)
    facts = autoencoder_facts(config.ae)
    precision = "fp32" if config.tile else precision_for(facts, config.precision)
    config = config.model_copy(update={"precision": settled(precision, device)})
    manner = Manner(config, choose_format(config.format, facts), facts, device, source)
    model = load_autoencoder(config.ae, device, config.precision)
    if config.tile:
        compute_in_tiles(model, config.tile, exact=config.tiling == "exact", scratch=config.scratch)
    if config.tar is None:
        make_directory(config.out)
        if config.part == (1, 1):  # else what is unfinished may be another job's at work
            sweep_temporaries(config.out)
    small: dict[int, Thumbnail] = {}  # by number: what is there already comes before its time
    moving: dict[int, list[Frame]] = {}
    written = 0
    with ExitStack() as stack:
        reading = read_sample_stream(stream, source) if stream else read_samples(config.samples)
        blocks = stack.enter_context(closing(read_ahead(reading)))
        first = next(blocks, None)
        if first is None:
            raise DataError(f"{source} holds no samples")
        require_same_autoencoder(first.facts.autoencoder, config.ae, f"the samples in {source}")
        if config.feather and first.inpainted is None:
            raise UsageError(f"--feather: the samples in {source} carry no pictures with holes")
        total = first.facts.total if stream else count_samples(config.samples)
        if not total:
            raise DataError(f"{source} holds no samples")
        if config.animate != "none" and first.path is None:
            raise UsageError(f"--animate: draw the samples in {source} with --keep-path")
        mine = share_of(total, config.part)
        manner = manner._replace(seamless=seamless_of(first.facts, config, source))
        wrap_convolutions(model.decoder, AXES[manner.seamless])
        listing, add = None, None
        if config.tar is None:
            listing = stack.enter_context(Listing(config.out, config.part))
        else:
            add = stack.enter_context(_tar(manner, config.tar, output))
        progress = stack.enter_context(track("decode", len(mine), unit="picture"))
        all_blocks = itertools.chain([first], blocks)
        pictures = _pictures(all_blocks, ANY if stream else mine, model, manner, listing)
        ahead = max(2 * config.writers, config.batch_size)
        for one in in_order(lambda x: write_picture(x, manner), pictures, config.writers, ahead):
            if add is not None:
                add(one)
            elif listing is not None and config.provenance:
                listing.add(manner.path(one.name).name, one.record, one.sha256)
            if one.small is not None:
                small[one.number] = one.small
            if one.frames:
                moving[one.number] = one.frames
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
    if moving and sheet is not None:
        frames = moving_sheet([moving[number] for number in sorted(moving)], config)
        with atomic_file(sheet.with_suffix(f".denoising.{config.animate}")) as temporary:
            temporary.write_bytes(frames)
    say(f"{written} pictures{f' and {sheet.name}' if small and sheet else ''} in {place}")
    return None if place == STREAM else place


def _pictures(
    blocks: Iterator[Block],
    mine: range,
    model: Autoencoder,
    manner: Manner,
    listing: Listing | None,
) -> Iterator[Picture]:
    """The pictures to write, decoded in groups, and those that are there already."""
    start, names, made_by, feather = 0, set[str](), "", manner.config.feather
    for block in blocks:
        if block.facts.autoencoder != made_by:  # `cat` may have joined samples of several
            made_by = block.facts.autoencoder
            require_same_autoencoder(made_by, manner.config.ae, f"the samples in {manner.source}")
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
        for group, kept in _groups(len(todo), manner, model, block.latents):
            rows = torch.tensor([todo[place][0] for place in group])
            images = decoded(block, block.latents[rows], rows, kept, model, feather)
            for place, image in zip(group.tolist(), images, strict=False):
                row, picture = todo[place]
                if listing is not None:
                    listing.forget(manner.path(picture.name).name)
                frames = tuple(_on_the_way(block, row, model, manner))
                yield picture._replace(image=image, frames=frames)


def _on_the_way(block: Block, row: int, model: Autoencoder, manner: Manner) -> Iterator[OneImage]:
    """What was expected before a sample was finished, where it is to be shown."""
    if manner.config.animate == "none":
        return
    if block.path is None:
        raise DataError(
            f"--animate: some of the samples in {manner.source} are drawn without --keep-path"
        )
    for group, kept in _groups(block.path.shape[1], manner, model, block.latents):
        rows = torch.full_like(group, row)
        yield from decoded(block, block.path[row, group], rows, kept, model, manner.config.feather)


def _picture(block: Block, row: int, number: int, mine: range, manner: Manner) -> Picture:
    config, told = manner.config, block.told[row]
    place = number - mine.start if _sheet_path(config) is not None else MAX_PICTURES
    shown = place < MAX_PICTURES, place < MAX_MOVING and config.animate != "none"
    as_decoded: dict[str, Any] = {"format": manner.format}
    if manner.format in ("jpg", "webp"):
        as_decoded["quality"] = config.quality
    if config.tile and config.tiling == "independent":
        as_decoded["tile"] = config.tile
    if config.precision == "bf16":
        as_decoded["precision"] = "bf16"
    if manner.seamless != "none":
        as_decoded["seamless"] = manner.seamless
    if block.inpainted is not None:
        as_decoded["feather"] = config.feather
    if config.animate != "none" and block.path is not None:
        as_decoded["animate"] = [config.animate, block.path.shape[1]]
    record = {
        KEY: RECORD_VERSION,
        "seed": block.seeds[row],
        "told": told,
        "diffusion": block.facts.diffusion,
        "autoencoder": manner.facts.fingerprint,
        "manner": block.facts.manner,
        "decoded": as_decoded,
        "latents": block.digests[row],
        "versions": {"sampled": block.facts.versions, "decoded": versions()},
    }
    name = picture_name(block.seeds[row], words_of(told))
    group = str(told.get("class", words_of(told)))
    return Picture(number, name, group, record, *shown, None)


def _there(picture: Picture, manner: Manner, listing: Listing) -> bool:
    """Whether the picture's file is there and was made of the same, by whatever versions."""
    path = manner.path(picture.name)
    moving = manner.config.animate == "none" or manner.animation(picture.name).is_file()
    if not (path.is_file() and moving) or listing.is_damaged(path.name):
        return False
    try:
        carries = FORMATS[manner.format].carries_text
        found = provenance_of(path) if carries else listing.record(path.name)
    except DataError:  # not one of ours, or damaged: it is made anew
        return False
    return found is not None and as_text(found | {"versions": None}) == as_text(
        picture.record | {"versions": None}
    )


def _groups(
    count: int, manner: Manner, model: Autoencoder, latents: Tensor
) -> Iterator[tuple[Tensor, int]]:
    """As `sample_groups`; in tiles one by one, since even one picture may be large."""
    if manner.config.tile:
        return ((torch.tensor([number]), 1) for number in range(count))
    pixels = latents.shape[2] * latents.shape[3]
    return sample_groups(count, manner.config.batch_size, model, pixels)


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
            make_directory(path.parent)
            sweep_temporaries(path.parent, path.name)
            file = stack.enter_context(stack.enter_context(atomic_file(path)).open("wb"))

        def add(one: Written) -> None:
            file.write(tar_member(manner.path(one.name).name, one.data))
            if one.moving:
                file.write(tar_member(manner.animation(one.name).name, one.moving))
            if manner.config.provenance:
                line = line_of(manner.path(one.name).name, Entry(one.record, one.sha256))
                file.write(tar_member(f"{one.name}.json", line.encode()))

        yield add
        file.write(END)
