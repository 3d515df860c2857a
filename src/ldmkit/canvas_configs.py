"""Options of `sample` for pictures of other sizes than the training's. Imports no torch."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from ldmkit.fields import Config, Positive, field

Seamless = Literal["none", "x", "y", "both"]


def _sides(given: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6})?", given):
        raise ValueError("write WIDTHxHEIGHT or one number, pixels, such as 512x256")
    return given


class CanvasConfig(Config):
    """What the pictures' area is, and how it is denoised."""

    size: Annotated[str, AfterValidator(_sides)] | None = field(
        None,
        "Width and height of the pictures, pixels, such as 512x256; one number for squares (default: what the"
        " model was trained on)",
    )
    tile: Positive | Literal["auto"] | None = field(
        None,
        "Denoise in overlapping square windows of so many pixels, whose estimates are averaged; auto = the"
        " size the model was trained on (default: the whole picture at once)",
    )
    tile_overlap: Positive | None = field(
        None,
        "With --tile: pixels that neighbouring windows share, at least (default: half a window)",
    )
    seamless: Seamless = field(
        "none",
        "Pictures that continue at their opposite border, so that they tile: along x, y or both",
    )
    ae: Path | None = field(
        None,
        "Autoencoder file, for models whose file does not say how many pixels a latent stands for",
    )

    @model_validator(mode="after")
    def _overlap_of_tiles(self) -> "CanvasConfig":
        if self.tile_overlap is not None and self.tile is None:
            raise ValueError("--tile-overlap needs --tile")
        return self
