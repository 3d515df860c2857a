"""What a model is told about classes, of pictures and of pixels: settings, and what its file stores.

Imports no torch.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import model_serializer

from ldmkit.fields import Config, Count, Positive, field
from ldmkit.label_names import ClassColour, LabelSet


class ClassSettings(Config):
    """Classes of the pictures."""

    way: Literal["tokens", "vector"] = field(
        "tokens",
        "How the network learns the class: tokens, one that is attended to (the paper) for each label set;"
        " vector, added to the time embedding",
    )


class ClassCondition(ClassSettings):
    """One class for each picture, or one of each of several label sets."""

    kind: Literal["class"] = "class"
    names: tuple[str, ...]
    """Of the classes, by index; of the first label set, where there are several."""
    sets: tuple[LabelSet, ...] = ()
    """The label sets by name, where the data have names for them."""

    @property
    def label_sets(self) -> tuple[LabelSet, ...]:
        """All label sets; the one of data that has no name for it is called ""."""
        return self.sets or (LabelSet(name="", classes=self.names),)

    @property
    def attended(self) -> bool:
        """Whether it gives tokens."""
        return self.way == "tokens"

    @property
    def channels(self) -> int:
        """How many channels it adds to the latents."""
        return 0

    @model_serializer(mode="wrap")
    def _as_ever_with_one_set(self, dumped: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return _without_empty(dumped(self), "sets")


class LabelMapSettings(Config):
    """Classes of the pixels."""

    mapped: Positive = field(3, "Learnt channels that are concatenated to the latents")


class LabelMapCondition(LabelMapSettings):
    """A label map for each picture."""

    kind: Literal["labelmap"] = "labelmap"
    classes: Positive
    stages: Count
    """Halvings from the map to the latents."""
    colours: tuple[ClassColour, ...] = ()
    """What colours mean in maps that are RGB pictures."""

    attended: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        """How many channels it adds to the latents."""
        return self.mapped

    @model_serializer(mode="wrap")
    def _as_ever_without_colours(self, dumped: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return _without_empty(dumped(self), "colours")


def _without_empty(dump: dict[str, Any], name: str) -> dict[str, Any]:
    """What is stored, as it was before there was such a field, where the field says nothing."""
    if not dump[name]:
        del dump[name]
    return dump
