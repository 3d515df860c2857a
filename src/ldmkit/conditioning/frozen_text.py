"""Text, frozen: embeddings of captions by a tower of open_clip, stored with the latents."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldmkit.condition_configs import EmbeddedTextOptions
from ldmkit.conditioning.kind import Kind, Reader
from ldmkit.conditioning.open_clip_weights import Embeddings
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
from ldmkit.conditioning.text_tower import encode_texts, load_tower
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError
from ldmkit.tower_configs import EmbeddedTextCondition

OPTION = "--text-weights"


def embedded(
    config: EmbeddedTextCondition, texts: Sequence[str], weights: Path | None
) -> Embeddings:
    """The values of some texts, by the tower that the training captions were embedded with.

    Args:
        config: of the condition.
        texts: one for each sample.
        weights: of the tower.

    Raises:
        UsageError: no weights are named.
        DataError: they cannot be read, or are those of another tower.
    """
    file = require_weights(config, weights, "prompts", OPTION)
    tower = load_tower(
        config.encoder, file, config.output, option=OPTION, pad_with_end=config.pad_with_end
    )
    require_same_tower(tower, config, file)
    return as_stored(encode_texts(tower, texts, BATCH))


def _settle(options: EmbeddedTextOptions, latents: LatentSet) -> EmbeddedTextCondition:
    del options
    advice = (
        "embedded captions, which --condition embedded-text needs; encode with --text-encoder NAME "
        "--text-weights FILE"
    )
    return EmbeddedTextCondition(**stored_facts(latents, "text", advice))


def _reader(
    config: EmbeddedTextCondition, options: EmbeddedTextOptions, latents: LatentSet
) -> Reader:
    if _settle(options, latents) != config:
        raise DataError(f"{latents.directory} has captions embedded by another text tower")
    return column_reader(latents, "text")


def _row(config: EmbeddedTextCondition, value: object) -> Tensor:
    raise ValueError("a text is embedded by its tower, not by itself")


EMBEDDED_TEXT = Kind(
    settle=_settle,
    build=build,
    reader=_reader,
    row=_row,
    silence="",
    start=lambda conditioner, latents: take_empty(conditioner, latents.empty_text()),
)
