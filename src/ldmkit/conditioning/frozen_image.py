"""Pictures, frozen: embeddings by an image tower of open_clip, stored with the latents, for variations."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.condition_configs import EmbeddedImageOptions
from ldmkit.conditioning.image_tower import (
    FrozenImageTower,
    embed_pictures,
    fitted_to,
    load_image_tower,
)
from ldmkit.conditioning.kind import Kind, Reader
from ldmkit.conditioning.open_clip_weights import Embeddings
from ldmkit.conditioning.picture_files import read_values
from ldmkit.conditioning.stored_embedding import (
    BATCH,
    as_stored,
    build,
    column_reader,
    require_same_tower,
    require_weights,
    stored_facts,
    take_empty,
)
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latents import IMAGE_EMBEDDING
from ldmkit.errors import DataError
from ldmkit.tower_configs import EmbeddedImageCondition

OPTION = "--image-weights"


def read_shown(config: EmbeddedImageCondition, path: object) -> Float[Tensor, "channels size size"]:
    """The picture in a file, cut and resized as the training pictures were before they were embedded.

    Raises:
        ValueError: it is not there, or has pixels without a value.
        DataError: it cannot be read, or has other channels.
    """
    picture = read_values(path, config.image_channels)
    if not picture.isfinite().all():
        raise ValueError(f"{path} has pixels without a value: fill its gaps first")
    return fitted_to(picture, config.size)


def embedded_pictures(
    config: EmbeddedImageCondition, pictures: Iterable[Tensor | None], weights: Path | None
) -> Embeddings:
    """The values of some pictures, by the tower that the training pictures were embedded with.

    Args:
        config: of the condition.
        pictures: as `read_shown` gives them; None where nothing is said, which is all zeros.
        weights: of the tower; not asked for where no picture is.

    Raises:
        UsageError: no weights are named.
        DataError: they cannot be read, or are those of another tower.
    """
    tower: FrozenImageTower | None = None
    found = []
    left = iter(pictures)
    while part := list(islice(left, BATCH)):
        rows = torch.zeros(len(part), config.count, config.width)
        told = [number for number, picture in enumerate(part) if picture is not None]
        if told:
            tower = tower or _tower(config, weights)
            shown = torch.stack([picture for picture in part if picture is not None])
            rows[told] = embed_pictures(tower, shown, BATCH)
        found.append(rows)
    return as_stored(torch.cat(found))


def _tower(config: EmbeddedImageCondition, weights: Path | None) -> FrozenImageTower:
    file = require_weights(config, weights, "pictures", OPTION)
    tower = load_image_tower(
        config.encoder, file, config.output, option=OPTION, colours=config.colours
    )
    require_same_tower(tower, config, file)
    return tower


def _settle(options: EmbeddedImageOptions, latents: LatentSet) -> EmbeddedImageCondition:
    del options
    advice = (
        "embedded pictures, which --condition embedded-image needs; encode with --image-encoder NAME "
        "--image-weights FILE"
    )
    facts = stored_facts(latents, IMAGE_EMBEDDING, advice)
    seen = latents.manifest.recipe["preprocessing"]
    return EmbeddedImageCondition(**facts, image_channels=seen["channels"], size=seen["size"])


def _reader(
    config: EmbeddedImageCondition, options: EmbeddedImageOptions, latents: LatentSet
) -> Reader:
    if _settle(options, latents) != config:
        raise DataError(
            f"{latents.directory} has pictures embedded by another image tower, or at another size"
        )
    return column_reader(latents, IMAGE_EMBEDDING)


def _row(config: EmbeddedImageCondition, value: object) -> Tensor:
    raise ValueError("a picture is embedded by its tower, not by itself")


EMBEDDED_IMAGE = Kind(
    settle=_settle,
    build=build,
    reader=_reader,
    row=_row,
    silence="",
    start=lambda conditioner, latents: take_empty(
        conditioner, torch.zeros_like(latents.rows(IMAGE_EMBEDDING, [0])[0], dtype=torch.float32)
    ),
)
