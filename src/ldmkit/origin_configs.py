"""What samples begin with, where it is not a seed's noise alone. Imports no torch."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ldmkit.fields import Config, Count, field

USUAL_STRENGTH = 0.6
USUAL_FRAMES = 8


class OriginConfig(Config):
    """Options of `sample` that begin with latents, a picture around a hole, given noise or two seeds."""

    from_: Path | None = field(
        None,
        "Latent set or sample file to begin with (image to image): its latents, noised as --strength says,"
        " take turns",
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = field(
        None,
        "With --from or --inpaint: share of the noise levels that is walked, the less noisy ones; 1 keeps next"
        " to nothing of the source (default: 0.6; of --inpaint: begin with noise alone)",
    )
    inpaint: Path | None = field(
        None,
        "Latent set of `encode --holes ... --keep-pictures`: fill the holes and keep what is around them, with"
        " any model",
    )
    noise: Path | None = field(None, "Noise file of `ldmkit invert` to begin with, by turns")
    between: tuple[Count, ...] = field(
        (),
        "Seeds, two or more: a strip of samples from the first to the last, noise and conditions in between",
    )
    frames: Annotated[int, Field(ge=2)] | None = field(
        None, "With --between: samples in the strip, both ends included (default: 8)"
    )

    @property
    def share(self) -> float:
        """Of the noise levels that are walked."""
        if self.strength is not None:
            return self.strength
        return 1.0 if self.from_ is None else USUAL_STRENGTH

    @model_validator(mode="after")
    def _one_origin(self) -> "OriginConfig":
        origins = {
            "--from": self.from_ is not None,
            "--inpaint": self.inpaint is not None,
            "--noise": self.noise is not None,
            "--between": bool(self.between),
        }
        given = [name for name, there in origins.items() if there]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say what to begin with: give one")
        if self.strength is not None and given not in (["--from"], ["--inpaint"]):
            raise ValueError("--strength is for --from and --inpaint: give one of them too")
        if len(self.between) == 1:
            raise ValueError("--between takes two seeds or more, such as 3,8")
        if self.frames is not None and not self.between:
            raise ValueError("--frames is for --between: give its seeds too")
        return self
