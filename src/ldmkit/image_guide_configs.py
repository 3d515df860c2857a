"""Options of guidance by pictures behind the decoder, for `sample`. Imports no torch."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ldmkit.fields import Config, Positive, field


class ImageGuideConfig(Config):
    """Which pictures lead the samples, and how strongly."""

    guide_image: Path | None = field(
        None,
        "Lead the samples to pictures that look like this one when both are made smaller, with any model and"
        " without training: a picture file, a folder, or a latent set, whose pictures take turns",
    )
    guide_ae: Path | None = field(
        None, "With --guide-image: the autoencoder file of the model's latents"
    )
    guide_factor: Positive = field(
        4, "With --guide-image: how many times smaller pictures are compared; 1 = as they are"
    )
    guide_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = field(
        50.0,
        "With --guide-image: how strongly; 1 / variance of the difference that is allowed for each number, in"
        " pictures of [-1, 1]; 0 = not at all",
    )

    @model_validator(mode="after")
    def _guide_is_whole(self) -> "ImageGuideConfig":
        usual = ImageGuideConfig.model_fields
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("guide_ae", "guide_factor", "guide_scale")
            if getattr(self, name) != usual[name].default
        ]
        if self.guide_image is None and given:
            raise ValueError(f"{given[0]} is for --guide-image: name a picture, or leave it out")
        if self.guide_image is not None and self.guide_ae is None:
            raise ValueError(
                "--guide-image looks at samples through the decoder: name its file with --guide-ae"
            )
        return self
