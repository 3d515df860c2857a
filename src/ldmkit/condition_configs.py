"""What a diffusion model is told: the settings of each kind of condition, and what its file stores.

A kind has settings (`...Settings`), which a user chooses, and a config (`...Condition`), which adds
what the data say and stands in the model file. Imports no torch.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from ldmkit.class_configs import (
    ClassCondition,
    ClassSettings,
    LabelMapCondition,
    LabelMapSettings,
)
from ldmkit.fields import Config, Finite, Fraction, Names, Positive, field, listed
from ldmkit.tower_configs import EmbeddedImageCondition, EmbeddedTextCondition

ConditionKind = Literal[
    "class",
    "text",
    "embedded-text",
    "layout",
    "labelmap",
    "lowres",
    "mask",
    "scalars",
    "image",
    "embedded-image",
]


class Told(Config):
    """What every kind of condition has in training."""

    dropout: Fraction | None = field(
        None,
        "Share of samples that are not told it, for guidance (default: as --condition-dropout says)",
    )


class ClassOptions(ClassSettings, Told):
    """Training options of the class condition."""

    sets: Names = field(
        None,
        "NAME,NAME,...: label sets that the model is told (default: all that the latents have)",
    )
    set_dropout: Fraction | None = field(
        None,
        "With several label sets: share of samples that are not told one of them, for each set by itself and"
        " beside the share that is told none (default: as --condition-dropout says)",
    )


class EncoderSettings(Config):
    """A transformer over ids, trained along."""

    depth: Positive = field(4, "Blocks of the transformer")
    heads: Positive = field(8, "Attention heads of each block")
    head_width: Positive = field(
        64, "Width of a head; the tokens are as wide as --unet.context-channels"
    )


class TextSettings(EncoderSettings):
    """Captions, by a transformer that is trained along."""

    length: Annotated[int, Field(ge=3)] = field(
        77, "Tokens of a caption; what is longer is cut off"
    )


class TextCondition(TextSettings):
    """A caption for each picture."""

    kind: Literal["text"] = "text"
    merges: tuple[tuple[int, int], ...] | None
    """Of a vocabulary trained on the captions; None for open_clip's."""

    attended: ClassVar[bool] = True
    channels: ClassVar[int] = 0


class TextOptions(TextSettings, Told):
    """Training options of the text condition."""

    vocabulary: Literal["clip", "own"] = field(
        "clip", "Word pieces: open_clip's 49,408, or pieces found in the captions"
    )
    vocabulary_size: Annotated[int, Field(ge=259)] = field(
        4096, "How many pieces of one's own to find at most"
    )
    without: Literal["refuse", "null"] = field(
        "refuse", "Pictures without a caption: refuse, or train on them as told nothing"
    )


class EmbeddedTextOptions(Told):
    """Training options of the embedded text condition."""


class LayoutSettings(EncoderSettings):
    """Boxes with classes, as the paper's token triples."""

    objects: Positive = field(30, "Boxes of a picture; of more the largest are seen")
    vocabulary: Positive = field(
        8192,
        "Ids for classes and corners: places are told in steps of 1/sqrt of it (the paper: 8192)",
    )


class LayoutCondition(LayoutSettings):
    """Boxes for each picture."""

    kind: Literal["layout"] = "layout"
    names: tuple[str, ...]
    """Of the boxes' classes, by index."""

    attended: ClassVar[bool] = True
    channels: ClassVar[int] = 0


class LayoutOptions(LayoutSettings, Told):
    """Training options of the layout condition."""


class LabelMapOptions(LabelMapSettings, Told):
    """Training options of the label map condition."""

    classes: Positive | None = field(
        None, "Number of classes (default: the largest id in the set and one)"
    )


class LowResCondition(Config):
    """A small version of each picture."""

    kind: Literal["lowres"] = "lowres"
    image_channels: Positive
    ratio: Positive
    """How many times smaller than the pictures it is."""
    factor: Positive
    """How many times smaller than the pictures the latents are."""

    attended: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        """How many channels it adds to the latents."""
        return self.image_channels


class LowResOptions(Told):
    """Training options of the low-resolution condition."""

    noise: Annotated[float, Field(ge=0, le=1)] = field(
        0.0,
        "Largest level of noise added to it, which the model is told: 0 = none, 1 = nothing is left",
    )


class MaskCondition(Config):
    """A picture with a hole."""

    kind: Literal["mask"] = "mask"
    latent_channels: Positive
    convention: Literal["ldm", "sd"]
    """Order of the channels and range of the mask: the paper's code, or Stable Diffusion's."""

    attended: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        """How many channels it adds to the latents."""
        return self.latent_channels + 1


class MaskOptions(Told):
    """Training options of the mask condition."""


class ScalarSettings(Config):
    """Continuous values."""

    way: Literal["vector", "tokens"] = field(
        "vector",
        "How the network learns them: vector, added to the time embedding; tokens, one for each",
    )


class ScalarCondition(ScalarSettings):
    """Some numbers for each picture."""

    kind: Literal["scalars"] = "scalars"
    names: tuple[str, ...]
    mean: tuple[Finite, ...]
    """Of each over the training data."""
    std: tuple[Finite, ...]

    @property
    def attended(self) -> bool:
        """Whether it gives tokens."""
        return self.way == "tokens"

    channels: ClassVar[int] = 0


class ScalarOptions(ScalarSettings, Told):
    """Training options of the scalar condition."""


class ImageSettings(Config):
    """Another picture, by a network that is trained along."""

    hidden: Positive = field(64, "Channels of the first level of the network")


class ImageCondition(ImageSettings):
    """A small picture for each picture."""

    kind: Literal["image"] = "image"
    image_channels: Positive
    size: Positive
    """Side, pixels."""

    attended: ClassVar[bool] = True
    channels: ClassVar[int] = 0


class ImageOptions(ImageSettings, Told):
    """Training options of the image condition."""


class EmbeddedImageOptions(Told):
    """Training options of the embedded image condition."""


ConditionConfig = Annotated[
    ClassCondition
    | TextCondition
    | EmbeddedTextCondition
    | LayoutCondition
    | LabelMapCondition
    | LowResCondition
    | MaskCondition
    | ScalarCondition
    | ImageCondition
    | EmbeddedImageCondition,
    Field(discriminator="kind"),
]
"""Any of the stored configs."""


class ConditioningConfig(Config):
    """What `train-diffusion` tells a model."""

    condition: Annotated[
        tuple[Literal["auto", "none", ConditionKind], ...], BeforeValidator(listed)
    ] = field(
        ("auto",),
        "What the model is told: class, text, embedded-text, layout (boxes), labelmap, lowres (super-resolution), mask"
        " (inpainting), scalars, image, embedded-image (variations); repeat for several; auto = class where the latents"
        " have labels, else none",
    )
    condition_dropout: Fraction = field(
        0.1, "Share of samples trained without a condition, for classifier-free guidance"
    )
    classes: ClassOptions = ClassOptions()
    text: TextOptions = TextOptions()
    embedded_text: EmbeddedTextOptions = EmbeddedTextOptions()
    layout: LayoutOptions = LayoutOptions()
    labelmap: LabelMapOptions = LabelMapOptions()
    lowres: LowResOptions = LowResOptions()
    mask: MaskOptions = MaskOptions()
    scalars: ScalarOptions = ScalarOptions()
    image: ImageOptions = ImageOptions()
    embedded_image: EmbeddedImageOptions = EmbeddedImageOptions()

    def options_of(self, kind: str) -> Told:
        """The options of one kind of condition."""
        return self.classes if kind == "class" else getattr(self, kind.replace("-", "_"))

    def dropouts(self, kinds: Sequence[str]) -> dict[str, float]:
        """Share of samples that are not told each of these."""
        own = {kind: self.options_of(kind).dropout for kind in kinds}
        return {
            kind: self.condition_dropout if share is None else share for kind, share in own.items()
        }

    @property
    def set_dropout(self) -> float:
        """Share of samples that are not told one of several label sets, for each set by itself."""
        share = self.classes.set_dropout
        return self.condition_dropout if share is None else share

    @model_validator(mode="after")
    def _conditions_stand_together(self) -> "ConditioningConfig":
        if len(self.condition) > 1 and {"auto", "none"} & set(self.condition):
            raise ValueError("--condition auto and --condition none stand alone")
        if len(self.condition) != len(set(self.condition)) or not self.condition:
            raise ValueError("--condition names each kind once")
        return self
