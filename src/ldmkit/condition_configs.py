"""What a diffusion model is told: the settings of each kind of condition, and what its file stores.

A kind has settings (`...Settings`), which a user chooses, and a config (`...Condition`), which adds
what the data say and stands in the model file. Imports no torch.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from ldmkit.fields import Config, Fraction, field, listed

ConditionKind = Literal["class"]


class Told(Config):
    """What every kind of condition has in training."""

    dropout: Fraction | None = field(
        None,
        "Share of samples that are not told it, for guidance (default: as --condition-dropout says)",
    )


class ClassSettings(Config):
    """Classes of the pictures."""

    way: Literal["tokens", "vector"] = field(
        "tokens",
        "How the network learns the class: tokens, one that is attended to (the paper); vector, added"
        " to the time embedding",
    )


class ClassCondition(ClassSettings):
    """One class for each picture."""

    kind: Literal["class"] = "class"
    names: tuple[str, ...]
    """Of the classes, by index."""

    @property
    def attended(self) -> bool:
        """Whether it gives tokens."""
        return self.way == "tokens"

    @property
    def channels(self) -> int:
        """How many channels it adds to the latents."""
        return 0


class ClassOptions(ClassSettings, Told):
    """Training options of the class condition."""


ConditionConfig = ClassCondition
"""Any of the stored configs."""


class ConditioningConfig(Config):
    """What `train-diffusion` tells a model."""

    condition: Annotated[
        tuple[Literal["auto", "none", ConditionKind], ...], BeforeValidator(listed)
    ] = field(
        ("auto",),
        "What the model is told: class; repeat for several; auto = class where the latents have labels,"
        " else none",
    )
    condition_dropout: Fraction = field(
        0.1, "Share of samples trained without a condition, for classifier-free guidance"
    )
    classes: ClassOptions = ClassOptions()

    def options_of(self, kind: str) -> Told:
        """The options of one kind of condition."""
        return {"class": self.classes}[kind]

    def dropouts(self, kinds: Sequence[str]) -> dict[str, float]:
        """Share of samples that are not told each of these."""
        own = {kind: self.options_of(kind).dropout for kind in kinds}
        return {
            kind: self.condition_dropout if share is None else share for kind, share in own.items()
        }

    @model_validator(mode="after")
    def _conditions_stand_together(self) -> "ConditioningConfig":
        if len(self.condition) > 1 and {"auto", "none"} & set(self.condition):
            raise ValueError("--condition auto and --condition none stand alone")
        if len(self.condition) != len(set(self.condition)) or not self.condition:
            raise ValueError("--condition names each kind once")
        return self
