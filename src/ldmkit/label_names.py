"""What classes are called where there are several label sets, and what colours label maps have.

Latent sets and model files store both. Imports no torch.
"""

from typing import Annotated

from pydantic import Field

from ldmkit.fields import Config

Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]
"""Red, green, blue."""
UNLABELLED = 255
"""What latent sets store where a pixel or a picture has no class."""


class LabelSet(Config):
    """One of several sets of classes that each picture has one of, such as its kind or its style."""

    name: str
    classes: tuple[str, ...]
    """Their names, by index."""


class ClassColour(Config):
    """A colour of label maps, and the class that it stands for."""

    colour: Colour
    id: Byte
    """Class; 255 = unknown."""
    name: str = ""
    """Of the class; "" where the table has none."""


def class_names_of(colours: tuple[ClassColour, ...]) -> tuple[str, ...]:
    """The names of the classes of a colour table, by id; the number where one has none."""
    names = {one.id: one.name or str(one.id) for one in colours if one.id != UNLABELLED}
    return tuple(names.get(number, str(number)) for number in range(max(names, default=-1) + 1))
