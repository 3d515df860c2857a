"""One picture on its way to a file: bytes, thumbnail, animation; in any thread."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from ldmkit.canvas_configs import Seamless
from ldmkit.decode_configs import DecodeConfig, PictureFormat
from ldmkit.durable import atomic_file
from ldmkit.facts import AutoencoderFacts
from ldmkit.output import animation
from ldmkit.output.contact_sheet import Thumbnail, contact_sheet, thumbnail
from ldmkit.output.formats import FORMATS, Note, encode_picture, pixels_of_file, units_of
from ldmkit.output.provenance import Provenance, as_text
from ldmkit.pixels import OneImage, shown, to_pixels


class Picture(NamedTuple):
    """One picture on its way to a file."""

    number: int
    """Of the sample, in the whole stream."""
    name: str
    """Of the file, without suffix."""
    group: str
    """What it was told, in words: pictures of one group share rows of the sheet."""
    record: Provenance
    shown: bool
    """Whether it stands in the sheet."""
    shown_moving: bool
    """Whether it stands in the moving sheet."""
    image: OneImage | None
    """None where its file is there already."""
    frames: tuple[OneImage, ...] = ()
    """On the way to it."""


class Written(NamedTuple):
    """What is left of a picture once it is encoded, and in the directory if it goes there."""

    number: int
    name: str
    record: Provenance
    sha256: str
    """Of the file (hex)."""
    data: bytes
    """To go into a tar; empty where there is none."""
    moving: bytes
    """Its animation, where there is one to go into a tar."""
    small: Thumbnail | None
    frames: list[animation.Frame]
    """Of its animation, for the sheet."""


class Manner(NamedTuple):
    """What is known before the first sample is read."""

    config: DecodeConfig
    format: PictureFormat
    facts: AutoencoderFacts
    device: torch.device
    source: str
    """How to call the samples in errors."""
    seamless: Seamless = "none"
    """Along which axes pictures are decoded without borders."""

    def path(self, name: str) -> Path:
        """Where the picture of that name lies."""
        return self.config.out / f"{name}.{FORMATS[self.format].suffix}"

    def animation(self, name: str) -> Path:
        """Where its animation lies."""
        return self.config.out / f"{name}.denoising.{self.config.animate}"


def write_picture(picture: Picture, manner: Manner) -> Written:
    """Encode a picture, and put it into the directory if it goes there; in any thread."""
    config, path = manner.config, manner.path(picture.name)
    units = units_of(manner.facts)
    moving = moving_bytes(picture, manner)
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
        small = thumbnail(pixels[0], picture.name, picture.group)
    frames = animation.frames_of(moving) if picture.shown_moving else []
    for_tar = (data, moving) if config.tar else (b"", b"")
    sha256 = hashlib.sha256(data).hexdigest()
    return Written(picture.number, picture.name, picture.record, sha256, *for_tar, small, frames)


def moving_bytes(picture: Picture, manner: Manner) -> bytes:
    """The animation of a picture, in the directory if it goes there; before the picture, which vouches for it."""
    config, path = manner.config, manner.animation(picture.name)
    if config.animate == "none":
        return b""
    if picture.image is None:
        return path.read_bytes()
    pixels = shown(to_pixels(torch.stack([*picture.frames, picture.image])))
    data = animation.animation(list(pixels.movedim(1, 3).numpy()), config.animate, config.quality)
    if config.tar is None:
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    return data


def moving_sheet(pictures: list[list[animation.Frame]], config: DecodeConfig) -> bytes:
    """The contact sheet of some animations, as one."""
    assert config.animate != "none"  # noqa: S101 - there are animations
    sheets = []
    for number in range(
        max(map(len, pictures))
    ):  # a format may have joined frames that are the same
        frames = [
            torch.from_numpy(one[min(number, len(one) - 1)]).movedim(2, 0) for one in pictures
        ]
        small = [thumbnail(frame, "", "") for frame in frames]
        sheets.append(contact_sheet(small, columns=config.columns).movedim(0, 2).numpy())
    return animation.animation(sheets, config.animate, config.quality)
