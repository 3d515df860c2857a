"""Configs of what is measured with a model: uncertainty, anomalies, likelihood, rate and distortion.

Imports no torch.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ldmkit.configs import STREAM
from ldmkit.fields import Config, Count, Fraction, Positive, argument, field
from ldmkit.generation_configs import SamplerName

MapFormat = Literal["png", "npy", "tiff32"]
"""Keep in step with `output.maps`: png is to look at, the others hold numbers."""
MAP_FORMATS = "png to look at; npy or tiff32: float32 in the units of the training pictures; repeat for several"
WHITE = (
    "What is white in PNG maps, in the units of the training pictures (default: a quarter of their range,"
    " 64 of 255)"
)


class MeasuringConfig(Config):
    """Which latents a model is measured on, and what it is told of them."""

    model: Path = argument("Diffusion model file")
    latents: Path = argument("Latent set, of the autoencoder that the model's latents are of")
    told: Literal["set", "nothing"] = field(
        "set", "What the model is told of each latent: what the set says, or nothing"
    )
    holdout: Fraction = field(
        0.0, "Only the share that training with this --holdout kept out; 0 = all latents"
    )
    seed: Count = field(0, "Fixes which latents are taken, and all noise")
    batch_size: Positive = field(
        16, "Latents at once (on the CPU always two); the result does not depend on it"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")


class SpreadConfig(Config):
    """Reduce samples that were told the same to their mean and standard deviation, pixel by pixel; writes to OUT."""

    samples: Path = argument("Sample file; - reads standard input", STREAM)
    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(Path("spread"), "Directory for the maps", short="-o")
    every: Annotated[int, Field(ge=2)] | None = field(
        None,
        "Samples in a group, in their order (default: all that were told the same are a group)",
    )
    format: tuple[MapFormat, ...] = field(("png",), f"Files of each map: {MAP_FORMATS}")
    white: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = field(None, WHITE)
    batch_size: Positive = field(
        16, "Samples decoded at once (on the CPU always two); the result does not depend on it"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")


class AnomalyConfig(MeasuringConfig):
    """Show where pictures differ from what a model of normal ones makes of them; writes maps and scores to OUT."""

    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(Path("anomaly"), "Directory for maps, scores and sheet", short="-o")
    num: Positive | None = field(None, "Latents to look at, drawn by --seed (default: all)")
    strength: Annotated[float, Field(gt=0, lt=1)] = field(
        0.5,
        "How far along the model's schedule noise is added: more forgets, and repairs, larger things",
    )
    draws: Positive = field(4, "How often each latent is noised and denoised; the mean counts")
    steps: Positive = field(20, "Model calls for each draw, exactly")
    sampler: SamplerName = field("ddim", "How the noise is taken away (docs/samplers.md)")
    share: Annotated[float, Field(gt=0, le=1)] = field(
        0.02, "A picture's score is the mean over this share of its pixels, those that differ most"
    )
    format: tuple[MapFormat, ...] = field(("png",), f"Files of each map: {MAP_FORMATS}")
    white: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = field(None, WHITE)


class LikelihoodConfig(MeasuringConfig):
    """Measure how likely a model finds latents: bits per dimension by the probability-flow ODE."""

    num: Positive | None = field(64, "Latents to measure, drawn by --seed")
    steps: Positive = field(
        24, "Steps from the least to the most noise, four model calls with gradients each"
    )
    probes: Positive = field(
        1, "Random directions in which the trace is estimated, for each latent; more are less noisy"
    )
    csv: Path | None = field(None, "File for the numbers of each latent (*.csv)")


class RateDistortionConfig(MeasuringConfig):
    """Draw the rate-distortion curve of a model: how many bits buy how much of the picture; CSV and SVG."""

    ae: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file")
    out: Path = field(
        Path("rate-distortion.csv"),
        "File of the numbers (*.csv); the plot lies beside it as *.svg",
        short="-o",
    )
    num: Positive | None = field(64, "Latents to measure, drawn by --seed")
    levels: Annotated[int, Field(ge=3)] = field(
        32, "Noise levels from the most noise to the least, even in log sigma; a model call each"
    )
