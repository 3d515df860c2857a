"""Frozen towers: the options of the image tower of `encode`, and what model files say of what was embedded.

Imports no torch.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import model_validator

from ldmkit.fields import Config, Positive, field

ImageOutput = Literal["pooled", "tokens"]
ColourScale = Literal["clip", "inception", "imagenet", "none"]
"""Keep both in step with `conditioning.image_tower`; a test compares them."""


class ImageTowerConfig(Config):
    """What embeds the pictures, for --condition embedded-image."""

    image_encoder: str | None = field(
        None,
        "Store embeddings of the pictures by the image tower of this open_clip architecture, such as"
        " ViT-L-14-quickgelu, for variations",
    )
    image_weights: Path | None = field(
        None, "Weights of --image-encoder: safetensors, or a checkpoint"
    )
    image_output: ImageOutput = field(
        "pooled",
        "What --image-encoder gives: the one embedding it was trained to give (pooled), or all tokens after"
        " its last block, one for each place",
    )
    image_colours: ColourScale | None = field(
        None,
        "Scale of colours that --image-weights were trained with (default: what open_clip says of those"
        " published for the architecture, else clip)",
    )

    @model_validator(mode="after")
    def _image_tower_has_a_name(self) -> "ImageTowerConfig":
        if self.image_encoder is None and (
            self.image_weights or self.image_colours or self.image_output != "pooled"
        ):
            raise ValueError(
                "--image-weights and other --image options are for --image-encoder NAME"
            )
        return self


class EmbeddedCondition(Config):
    """Something of each picture, embedded beforehand by a frozen tower of open_clip."""

    encoder: str
    """open_clip's name of the architecture."""
    fingerprint: str
    """Of the tower's weights."""
    count: Positive
    """Tokens of an embedding."""
    width: Positive
    """Of a token."""

    attended: ClassVar[bool] = True
    channels: ClassVar[int] = 0


class EmbeddedTextCondition(EmbeddedCondition):
    """A caption for each picture."""

    kind: Literal["embedded-text"] = "embedded-text"
    output: Literal["last", "penultimate", "pooled"]
    pad_with_end: bool


class EmbeddedImageCondition(EmbeddedCondition):
    """Another picture for each picture."""

    kind: Literal["embedded-image"] = "embedded-image"
    output: ImageOutput
    colours: ColourScale
    """Scale that the tower takes them in."""
    image_channels: Positive
    size: Positive
    """Side that the pictures had before they were brought to the tower's, pixels."""
