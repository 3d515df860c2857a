"""The frozen towers that `encode` embeds with, from its options, and what a set says of them."""

from functools import partial
from typing import NamedTuple

from ldmkit.autoencoder.latent_shards import Embed, first_line
from ldmkit.conditioning.text_tower import encode_texts, load_tower
from ldmkit.conditioning.tokenizer import proper_caption
from ldmkit.data.items import Source
from ldmkit.data.locations import shown
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import DataError
from ldmkit.facts import Facts
from ldmkit.training.runtime import pick_device


class Towers(NamedTuple):
    """What embeds; None where it was not asked for."""

    texts: Embed | None
    recipes: Facts
    """Column -> what decides its bytes."""


def towers_of(config: EncodeConfig, source: Source) -> Towers:
    """The towers that are asked for, on the device.

    Raises:
        DataError: there are no captions, one of them cannot be embedded, or weights are missing or
            damaged.
        UsageError: no weights are given, or the architecture is unknown.
    """
    recipes: Facts = {}
    texts = None
    if config.text_encoder is not None:
        texts, recipes["text"] = _text_tower(config, config.text_encoder, source)
    return Towers(texts, recipes)


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
