"""The frozen towers that `encode` embeds with, from its options, and what a set says of them."""

from functools import partial
from typing import NamedTuple

from ldmkit.autoencoder.latent_shards import Embed, See, first_line
from ldmkit.conditioning.image_tower import COLOUR_CHANNELS, embed_pictures, load_image_tower
from ldmkit.conditioning.text_tower import encode_texts, load_tower
from ldmkit.conditioning.tokenizer import proper_caption
from ldmkit.data.items import Source
from ldmkit.data.latents import IMAGE_EMBEDDING
from ldmkit.data.locations import shown
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import AutoencoderFacts, Facts
from ldmkit.training.runtime import pick_device


class Towers(NamedTuple):
    """What embeds; None where it was not asked for."""

    texts: Embed | None
    pictures: See | None
    recipes: Facts
    """Column -> what decides its bytes."""


def towers_of(config: EncodeConfig, facts: AutoencoderFacts, source: Source) -> Towers:
    """The towers that are asked for, on the device.

    Args:
        config: of the command.
        facts: of the autoencoder, whose pictures are embedded.
        source: of the pictures.

    Raises:
        DataError: there are no captions, one of them cannot be embedded, or weights are missing or
            damaged.
        UsageError: no weights are given, the architecture is unknown, or pictures have no colours for it.
    """
    recipes: Facts = {}
    texts, pictures = None, None
    if config.text_encoder is not None:
        texts, recipes["text"] = _text_tower(config, config.text_encoder, source)
    if config.image_encoder is not None:
        pictures, recipes[IMAGE_EMBEDDING] = _image_tower(config, config.image_encoder, facts)
    return Towers(texts, pictures, recipes)


def _text_tower(config: EncodeConfig, name: str, source: Source) -> tuple[Embed, Facts]:
    if not any(item.caption for item in source.items):
        raise DataError(
            f"--text-encoder embeds captions, and no picture of {shown(config.data)} has one"
        )
    for item in source.items:
        try:
            proper_caption(first_line(item.caption))
        except ValueError as error:
            raise DataError(f"the caption of {item.name} cannot be embedded: {error}") from error
    tower = load_tower(
        name,
        config.text_weights,
        config.text_output,
        option="--text-weights",
        pad_with_end=config.text_pad_with_end,
    )
    tower.network.to(pick_device(config.device))
    recipe = {
        "encoder": name,
        "output": config.text_output,
        "pad_with_end": config.text_pad_with_end,
        "fingerprint": tower.fingerprint,
    }
    return partial(encode_texts, tower, batch=config.batch_size), recipe


def _image_tower(config: EncodeConfig, name: str, facts: AutoencoderFacts) -> tuple[See, Facts]:
    if facts.image_channels not in (1, COLOUR_CHANNELS):
        raise UsageError(
            f"--image-encoder takes grey or RGB pictures, and those of {config.ae} have "
            f"{facts.image_channels} channels: leave it out"
        )
    tower = load_image_tower(
        name,
        config.image_weights,
        config.image_output,
        option="--image-weights",
        colours=config.image_colours,
    )
    tower.network.to(pick_device(config.device))
    recipe = {
        "encoder": name,
        "output": config.image_output,
        "colours": tower.colours,
        "fingerprint": tower.fingerprint,
    }
    return partial(embed_pictures, tower, batch=config.batch_size), recipe
