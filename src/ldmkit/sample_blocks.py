"""Sample files and streams of them, block by block, checked: latents and what each was told."""

import hashlib
import json
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from ldmkit.canvas_configs import Seamless
from ldmkit.data.latents import unragged
from ldmkit.decode_configs import DecodeConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import SampleFacts, validated
from ldmkit.modelfile import load_messages
from ldmkit.networks.seamless import AXES
from ldmkit.tensors import Images, Latents

COLUMNS = ("latents", "seed", "told.bytes", "told.offsets")
IMAGE, HOLE = "image", "hole"


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
    facts: SampleFacts


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
        DataError: a block is cut off, damaged, or of another kind.
    """
    for header, tensors in load_messages(file, source, kind="samples"):
        facts = validated(SampleFacts, header.facts, source)
        for name in COLUMNS:
            if name not in tensors:
                raise DataError(f"{source} lacks the column {name}")
        lines = unragged(tensors["told.bytes"].numpy(), tensors["told.offsets"].numpy())
        latents, seeds = tensors["latents"], tensors["seed"].tolist()
        if not len(latents) == len(seeds) == len(lines):
            raise DataError(f"{source} has columns of several lengths")
        told = [_told(line, source) for line in lines]
        inpainted = _inpainted(tensors, source)
        decisive = [tensors[name] for name in ("latents", IMAGE, HOLE) if name in tensors]
        digests = [_digest(decisive, row) for row in range(len(latents))]
        yield Block(latents, seeds, told, inpainted, digests, facts)


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
