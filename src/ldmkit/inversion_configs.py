"""Config of `invert`: which latents' noise is sought, and how. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldmkit.fields import Config, Positive, argument, field
from ldmkit.generation_configs import GridName


class InvertConfig(Config):
    """Find the noise that leads to given latents (DDIM inversion), for `sample --noise`."""

    model: Path = argument("Diffusion model file")
    latents: Path = argument("Latent set or sample file")
    out: Path = field(
        Path("runs/noise.safetensors"), "Noise file (*.safetensors) to write", short="-o"
    )
    steps: Positive = field(50, "Model calls for each sample, exactly")
    grid: GridName = field(
        "auto", "Which noise levels are visited, upwards; sample with the same (docs/samplers.md)"
    )
    label: tuple[str, ...] = field(
        (), "Class by name or index, or `none`; repeat for several, which take turns"
    )
    prompt: tuple[str, ...] = field((), "Text; repeat for several, which take turns")
    like: Path | None = field(
        None,
        "Latent set: tell the model what its latents are (default: a latent set that is inverted, itself)",
    )
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = field(
        1.0, "Weight of classifier-free guidance; 1 = off. Weights above lose accuracy on the way"
    )
    batch_size: Positive = field(
        16, "Samples at once, but on the CPU; the result does not depend on it"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")

    @model_validator(mode="after")
    def _one_source(self) -> "InvertConfig":
        if self.like is not None and (self.label or self.prompt):
            raise ValueError("--like and --label or --prompt both say what is told: give one")
        return self
