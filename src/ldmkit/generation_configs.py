"""Config of `sample`: what is drawn from a diffusion model, told what, and how. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldmkit.configs import STREAM
from ldmkit.fields import Config, Count, Fraction, Positive, Weight, argument, field


class SampleConfig(Config):
    """Draw latents from a diffusion model; to a file, or to standard output for `ldmkit decode`."""

    model: Path = argument("Diffusion model file")
    out: Path = field(
        STREAM, "Sample file (*.safetensors); - streams to standard output", short="-o"
    )
    num: Positive | None = field(
        None,
        "How many samples; what they are told takes turns (default: 16, or one for each line of --prompts"
        " and --conditions)",
    )
    label: tuple[str, ...] = field(
        (), "Class by name or index, or `none`; repeat for several, which take turns (default: all)"
    )
    prompt: tuple[str, ...] = field((), "Text; repeat for several, which take turns")
    prompts: Path | None = field(
        None, "File with a text in each line, for a sample each; - reads standard input"
    )
    text_weights: Path | None = field(
        None, "Weights of the text tower, for models that were trained on embedded text"
    )
    conditions: Path | None = field(
        None,
        "What each sample is told, a line each (*.jsonl, *.csv; - reads JSON lines from standard input):"
        " class, text, layout, ... by name",
    )
    like: Path | None = field(None, "Latent set: tell the samples what its latents are")
    holdout: Fraction = field(
        0.0, "With --like: only the share that training with this --holdout kept out; 0 = all"
    )
    steps: Positive = field(50, "Model calls for each sample (1 to T)")
    guidance: Weight = field(2.0, "Classifier-free guidance weight; 1 = off")
    eta: Annotated[float, Field(ge=0, le=1)] = field(0.0, "Noise put back by DDIM; 1 = DDPM")
    seed: Count = field(0, "Seed of the first sample; the next ones count up")
    batch_size: Positive = field(
        16,
        "Samples in a message and, but on the CPU, drawn at once; the result does not depend on it",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")

    @model_validator(mode="after")
    def _one_source(self) -> "SampleConfig":
        sources = {
            "--label or --prompt": bool(self.label or self.prompt),
            "--prompts": self.prompts is not None,
            "--conditions": self.conditions is not None,
            "--like": self.like is not None,
        }
        given = [name for name, there in sources.items() if there]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say what samples are told: give one")
        if self.holdout and self.like is None:
            raise ValueError("--holdout needs --like")
        return self
