"""Sample files and streams of them, block by block, checked: latents and what each was told."""

import hashlib
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.canvas_configs import Seamless
from ldmkit.conditioning.mask import blended
from ldmkit.container import read_headers
from ldmkit.data.latents import unragged
from ldmkit.decode_configs import DecodeConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import SampleFacts, SamplesSeen, validated
from ldmkit.modelfile import load_messages, require_kind
from ldmkit.networks.seamless import AXES
from ldmkit.pixels import OneImage
from ldmkit.tensors import Images, Latents

TOLD = "told"
COLUMNS = ("latents", "seed", f"{TOLD}.bytes", f"{TOLD}.offsets")
IMAGE, HOLE = "image", "hole"
PATH = "path"
Paths = Float[Tensor, "batch kept latent_channels y x"]


class Inpainted(NamedTuple):
    """Given pictures, of which the samples fill the holes."""

    images: Images
    holes: Bool[Tensor, "batch height width"]
    """True in the hole."""


class Block(NamedTuple):
    """Some samples of a file or stream."""

    latents: Latents
    """Raw."""
    seeds: list[int]
    told: list[dict[str, Any]]
    """By kind of condition, for people."""
    inpainted: Inpainted | None
    digests: list[str]
    """Of the columns that decide each sample's picture (16 hex digits)."""
    path: Paths | None
    """Clean estimates on the way to each sample, where they were kept."""
    facts: SampleFacts


def share_of(total: int, part: tuple[int, int]) -> range:
    """The numbers of the samples in a part of a job: fixed ranges that cover all once.

    Args:
        total: samples of all parts.
        part: which one, from 1, and of how many.
    """
    number, parts = part
    return range(total * (number - 1) // parts, total * number // parts)


def count_samples(path: Path) -> int:
    """How many samples a file has, from the headers of its messages alone.

    Raises:
        DataError: it cannot be read, or holds no samples.
    """
    count = 0
    for header in read_headers(path):
        require_kind(header, "samples", str(path))
        if "seed" not in header.tensors:
            raise DataError(f"{path} lacks the column seed")
        count += header.tensors["seed"].shape[0]
    return count


def read_samples(path: Path) -> Iterator[Block]:
    """The samples of a file.

    Raises:
        DataError: it cannot be read, is damaged, or holds no samples.
    """
    try:
        with path.open("rb") as file:
            yield from read_sample_stream(file, str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_sample_stream(file: BufferedIOBase, source: str) -> Iterator[Block]:
    """The samples of a pipe or an open file.

    Args:
        file: where to read.
        source: how to call it in errors.

    Raises:
        DataError: a block is cut off, damaged, or of another kind, or samples are missing.
    """
    complete = SamplesSeen(source)
    for header, tensors in load_messages(file, source, kind="samples"):
        facts = validated(SampleFacts, header.facts, source)
        for name in COLUMNS:
            if name not in tensors:
                raise DataError(f"{source} lacks the column {name}")
        lines = unragged(*(tensors[f"{TOLD}.{name}"].numpy() for name in ("bytes", "offsets")))
        latents, seeds = tensors["latents"], tensors["seed"].tolist()
        if not len(latents) == len(seeds) == len(lines):
            raise DataError(f"{source} has columns of several lengths")
        told = [_told(line, source) for line in lines]
        inpainted = _inpainted(tensors, source)
        decisive = [tensors[name] for name in ("latents", IMAGE, HOLE) if name in tensors]
        digests = [_digest(decisive, row) for row in range(len(latents))]
        path = tensors.get(PATH)
        if path is not None and (path.ndim != 5 or len(path) != len(latents)):
            raise DataError(
                f"{source}: {PATH} is to be [{len(latents)}, k, z, h, w], and is {list(path.shape)}"
            )
        complete.add(facts, len(seeds))
        yield Block(latents, seeds, told, inpainted, digests, path, facts)
    complete.close()


@torch.inference_mode()
def decoded(
    block: Block, latents: Latents, rows: Tensor, kept: int, model: Autoencoder, feather: int = 0
) -> Iterator[OneImage]:
    """The pictures of some latents, on the CPU, float32; of inpainted ones with all around the hole as given.

    Args:
        block: samples.
        latents: that go through the network together: the samples', or what was expected on the way.
        rows: of the block, which each of the latents belongs to.
        kept: how many of them count.
        model: the autoencoder.
        feather: width of the rim around the hole in which given and decoded picture are mixed, pixels.

    Raises:
        DataError: given and decoded pictures differ in size.
    """
    images = model.decode(latents.to(model.device))[:kept].float()
    if block.inpainted is not None:
        given, holes = (x[rows[:kept]].to(model.device) for x in block.inpainted)
        if given.shape != images.shape:
            raise DataError(
                f"the pictures with holes of the samples are {list(given.shape[1:])}, and the decoded ones "
                f"{list(images.shape[1:])}; sample for the pictures' own size"
            )
        images = blended(given, images, holes, feather)
    return iter(images.cpu())


def picture_name(seed: int, words: str) -> str:
    """File name of a picture without suffix: seed and what it was told, of safe characters only.

    Args:
        seed: of the sample.
        words: what it was told.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[:60].strip("-")
    return f"{seed:06d}-{slug}" if slug else f"{seed:06d}"


def seamless_of(facts: SampleFacts, config: DecodeConfig, source: str) -> Seamless:
    """Along which axes samples are decoded as pictures without borders: as asked, or as they were drawn.

    Args:
        facts: of the first block.
        config: of `decode`.
        source: how to call the samples in errors.

    Raises:
        DataError: the samples say something that is none of the axes.
        UsageError: they are to be decoded in tiles.
    """
    drawn = facts.manner.get("seamless", "none")
    if drawn not in AXES:
        raise DataError(f"{source} was drawn with seamless {drawn!r}: known are {', '.join(AXES)}")
    found = drawn if config.seamless == "auto" else config.seamless
    if found != "none" and config.tile:
        raise UsageError(
            f"--tile: pictures without borders (seamless {found}) are decoded as a whole; leave out --tile, "
            "or take --seamless none"
        )
    return found


def words_of(told: dict[str, Any]) -> str:
    """What a sample was told, as far as it is words."""
    return " ".join(value for value in told.values() if isinstance(value, str))


def _told(line: str, source: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} says in no JSON what a sample was told") from error
    if not isinstance(told, dict):
        raise DataError(f"{source} says what a sample was told, but not by kind of condition")
    return told


def _inpainted(tensors: dict[str, Tensor], source: str) -> Inpainted | None:
    found = [name for name in (IMAGE, HOLE) if name in tensors]
    if not found:
        return None
    if len(found) == 1:
        raise DataError(f"{source} has the column {found[0]}, but not both of {IMAGE} and {HOLE}")
    image, hole, count = tensors[IMAGE], tensors[HOLE], len(tensors["latents"])
    whole = image.dtype == hole.dtype == torch.uint8 and (image.ndim, hole.ndim) == (4, 3)
    if not whole or (count, *image.shape[2:]) != tuple(hole.shape) or len(image) != count:
        raise DataError(
            f"{source}: {IMAGE} and {HOLE} are to be uint8 [{count}, c, h, w] and [{count}, h, w], and are "
            f"{list(image.shape)} and {list(hole.shape)}"
        )
    return Inpainted(image.float() / 127.5 - 1.0, hole > 0)


def _digest(columns: list[Tensor], row: int) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(str((column.dtype, tuple(column.shape[1:]))).encode())
        digest.update(column[row].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
