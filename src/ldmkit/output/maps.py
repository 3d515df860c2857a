"""Maps of pixels (how far pictures spread, or differ) as files: numbers in units, or grey to look at."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ldmkit.durable import atomic_file
from ldmkit.facts import AutoencoderFacts
from ldmkit.measures_configs import MapFormat
from ldmkit.output.formats import FORMATS, Note, choose_format, encode_picture, units_of
from ldmkit.pixels import OneImage

GREY_SHARE = 0.25
"""Share of the pictures' range that is white in a map, unless something else is asked for."""
OneMap = Float[Tensor, "height width"]


def white_of(facts: AutoencoderFacts, wanted: float | None) -> float:
    """What is white in a map, in the units of the training pictures."""
    low, high = units_of(facts)
    return wanted if wanted is not None else GREY_SHARE * (high - low)


def over_channels(values: OneImage) -> OneMap:
    """One number for a pixel: the root of the mean square over its channels."""
    return values.square().mean(0).sqrt()


def require_formats(formats: Sequence[MapFormat], facts: AutoencoderFacts) -> None:
    """Check that maps of as many channels as the pictures have can be written in these formats.

    Raises:
        UsageError: tifffile is missing.
    """
    for name in formats:
        if name != "png":
            choose_format(name, facts)


def write_map(
    stem: Path,
    values: OneImage,
    formats: Sequence[MapFormat],
    facts: AutoencoderFacts,
    white: float,
) -> list[str]:
    """Write differences or standard deviations of pictures.

    Args:
        stem: of the files, without suffix.
        values: 0 or more, in units where pictures lie in [-1, 1].
        formats: png is grey, root mean square over channels; the others hold each channel.
        facts: of the pictures' autoencoder.
        white: what is white in PNG, in the units of the training pictures.

    Returns:
        The names of the files.
    """
    low, high = units_of(facts)
    half = (high - low) / 2.0
    grey = over_channels(values)[None] * (2.0 * half / white) - 1.0
    shown = {"png": grey}
    return [
        _write(stem, shown.get(name, values), name, (-half, half))
        for name in dict.fromkeys(formats)
    ]


def write_picture(
    stem: Path, image: OneImage, formats: Sequence[MapFormat], facts: AutoencoderFacts
) -> list[str]:
    """Write a picture in [-1, 1] beside its maps; returns the names of the files.

    PNG shows the first three channels, or of two the first.
    """
    seen = image[: 3 if len(image) >= 3 else 1]
    shown = {"png": seen}
    return [
        _write(stem, shown.get(name, image), name, units_of(facts))
        for name in dict.fromkeys(formats)
    ]


def _write(stem: Path, image: OneImage, name: MapFormat, units: tuple[float, float]) -> str:
    data = encode_picture(image.cpu(), name, units, Note("", 100, stem.name))
    path = stem.with_name(f"{stem.name}.{FORMATS[name].suffix}")
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return path.name
