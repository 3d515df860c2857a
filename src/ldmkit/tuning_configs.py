"""Config of `tune-steps`. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ldmkit.fields import Config, Count, Fraction, Positive, argument, field

TunedSampler = Literal["dpmpp-2m", "ddim"]


class TuneStepsConfig(Config):
    """Find the noise levels for a number of model calls that lose least of a model's own exact solutions."""

    model: Path = argument("Diffusion model file")
    latents: Path = argument("Latent set: samples are told what its latents are")
    out: Path = field(
        Path("steps.json"), "File of noise levels, for sample --grid FILE (*.json)", short="-o"
    )
    steps: Annotated[int, Field(ge=1, le=100)] = field(
        10,
        "Model calls for each sample; sample --steps may differ, and is then given levels between",
    )
    sampler: TunedSampler = field(
        "dpmpp-2m",
        "Whose steps are to lose least: ddim is of order 1, dpmpp-2m of order 2 as most others are",
    )
    holdout: Fraction = field(
        0.0, "Tell samples the share of LATENTS that training with this --holdout kept out; 0 = all"
    )
    num: Positive = field(
        32, "Samples that choose the levels; as many others say how much they are worth"
    )
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = field(
        None, "Weight of classifier-free guidance; 1 = off (default: as in sample)"
    )
    fine: Annotated[int, Field(ge=20, le=400)] = field(
        80, "Noise levels to choose from, and model calls of each exact solution"
    )
    seed: Count = field(0, "Seed of the first sample; the next ones count up")
    batch_size: Positive = field(16, "Samples at once")
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")
