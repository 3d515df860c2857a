"""Config of `sample`: what is drawn from a diffusion model, told what, and how. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ldmkit.canvas_configs import CanvasConfig
from ldmkit.configs import STREAM
from ldmkit.fields import (
    Config,
    Count,
    Fraction,
    NoiseRange,
    Positive,
    argument,
    field,
)
from ldmkit.image_guide_configs import ImageGuideConfig
from ldmkit.job_configs import SampleJobConfig
from ldmkit.origin_configs import OriginConfig
from ldmkit.precision_configs import InferencePrecisionConfig

SamplerName = Literal[
    "ddpm",
    "ddim",
    "plms",
    "euler",
    "euler-ancestral",
    "heun",
    "lms",
    "dpmpp-2s",
    "dpmpp-2m",
    "dpmpp-2m-sde",
    "dpmpp-3m-sde",
    "unipc",
    "deis",
    "er-sde",
    "restart",
]
"""Keep in step with `diffusion.samplers.SAMPLERS`; a test compares them."""
GridName = Literal[
    "auto",
    "trailing",
    "linspace",
    "leading",
    "ldm",
    "karras",
    "exponential",
    "beta",
    "align-your-steps",
]
"""Keep in step with `diffusion.grids.GRIDS`, but for auto; a test compares them."""
GRID_SUFFIX = ".json"


def _is_grid_file(path: Path) -> Path:
    if path.suffix != GRID_SUFFIX:
        raise ValueError(f"give a file of tune-steps (*{GRID_SUFFIX})")
    return path


GridFile = Annotated[Path, AfterValidator(_is_grid_file)]
Combination = Literal["composed", "nested"]
GrowthName = Literal["constant", "linear", "cosine"]
"""Keep both in step with `diffusion.guidance`; a test compares them."""
USUAL_GUIDANCE = 2.0


class SamplerOptions(Config):
    """Parameters of single samplers; None is the sampler's own default."""

    order: Annotated[int, Field(ge=1, le=4)] | None = field(
        None,
        "Steps that are looked back on, this one included: lms 1 to 4 (default 4); unipc, deis, er-sde 1 to"
        " 3 (default 3)",
    )
    churn: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = field(
        None,
        "euler, heun: noise added before steps, over all of them together (S_churn of Karras et al. 2022;"
        " default 0)",
    )
    restart_interval: NoiseRange | None = field(
        None,
        "restart: noise levels (standard deviations of whitened latents) between which the way is"
        " repeated (default 0.1,2)",
    )
    restart_repeats: Positive | None = field(
        None, "restart: how often it is repeated at most (default 2)"
    )


class SampleConfig(
    CanvasConfig, OriginConfig, ImageGuideConfig, SampleJobConfig, InferencePrecisionConfig
):
    """Draw latents from a diffusion model; to a file, or to standard output for `ldmkit decode`."""

    model: Path = argument("Diffusion model file")
    out: Path = field(
        STREAM, "Sample file (*.safetensors); - streams to standard output", short="-o"
    )
    num: Positive | None = field(
        None,
        "How many samples; what they are told takes turns (default: 16, or one for each line of --prompts"
        " and --conditions, or for each latent that they begin with)",
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
    image_weights: Path | None = field(
        None, "Weights of the image tower, for models that were trained on embedded pictures"
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
    steps: Positive = field(30, "Model calls for each sample, exactly")
    sampler: SamplerName = field("heun", "How noise becomes latents (docs/samplers.md)")
    grid: GridFile | GridName = field(
        "auto",
        "Which noise levels the sampler visits (docs/samplers.md); auto = the schedule's own: trailing for"
        " discrete ones, even in time for flow, even in sigma^(1/rho) for edm; FILE = what tune-steps found",
    )
    eta: Annotated[float, Field(ge=0, le=1)] | None = field(
        None,
        "Share of the noise that is drawn anew: ddim (default 0; 1 = DDPM), euler-ancestral, dpmpp-2m-sde,"
        " dpmpp-3m-sde (default 1)",
    )
    sampler_options: SamplerOptions = SamplerOptions()
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = field(
        None,
        "Weight of classifier-free guidance by all conditions together; 1 = off. Conditions that are"
        " concatenated (labelmap, lowres, mask) stay told (default: 2). With --weaker, its weight",
    )
    guidance_of: tuple[str, ...] = field(
        (),
        "KIND=WEIGHT: a condition's own weight, such as text=7.5; repeat for several, each of which takes one"
        " more row in each model call. Conditions without one stay told",
    )
    guidance_combination: Combination = field(
        "composed",
        "Several weights: composed, each condition alone against none; nested, each beside those named before"
        " it",
    )
    guidance_interval: NoiseRange | None = field(
        None,
        "Noise levels (standard deviations of whitened latents) within which guidance acts; HI may be inf"
        " (default: all)",
    )
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = field(
        0.0,
        "Share of the guided estimate that gets the standard deviation of the unguided one, against"
        " overexposure; 0 = off",
    )
    guidance_growth: GrowthName = field(
        "constant", "How weights grow from the first step to the last; their mean stays as given"
    )
    negative: str | None = field(
        None, "Text to lead away from: takes the place of the empty one in guidance"
    )
    weaker: Path | None = field(
        None,
        "Weaker model file to lead away from (autoguidance), instead of from the model told nothing: smaller,"
        " or trained for less long, on the same latents",
    )
    seed: Count = field(0, "Seed of the first sample; the next ones count up")
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")

    @property
    def weight(self) -> float:
        """The one weight, where no condition has its own."""
        return USUAL_GUIDANCE if self.guidance is None else self.guidance

    @property
    def weights(self) -> dict[str, float]:
        """Kind of condition -> its own weight, in the order they were named in."""
        return dict(_kind_and_weight(one) for one in self.guidance_of)

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

    @model_validator(mode="after")
    def _guidance_stands_together(self) -> "SampleConfig":
        if len(self.weights) < len(self.guidance_of):
            raise ValueError("--guidance-of names each kind of condition once")
        if self.guidance_of and self.guidance is not None:
            raise ValueError(
                "--guidance is one weight for all, --guidance-of one for each: give one"
            )
        if self.guidance_combination != "composed" and len(self.guidance_of) < 2:
            raise ValueError("--guidance-combination is for two --guidance-of or more")
        if self.weaker is not None and (self.guidance_of or self.negative is not None):
            other = "--guidance-of" if self.guidance_of else "--negative"
            raise ValueError(
                f"--weaker and {other} both say what to lead away from: leave one of them out"
            )
        return self


def _kind_and_weight(given: str) -> tuple[str, float]:
    kind, _, number = given.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not kind.strip() or not 0.0 <= weight < math.inf:
        raise ValueError(
            f"--guidance-of {given}: write KIND=WEIGHT with a weight of 0 or more, such as text=7.5"
        )
    return kind.strip(), weight
