"""Configs of the second stage: its network, noise schedule, objective and what its file stores.

Imports no torch.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from ldmkit.condition_configs import ConditionConfig
from ldmkit.fields import Config, Count, Finite, Fraction, Positive, Weight, field, listed


class UNetConfig(Config):
    """The network of the second stage (Dhariwal and Nichol 2021; Rombach et al. 2022, App. E)."""

    channels: Positive = field(192, "Channels of the finest level")
    multipliers: tuple[Positive, ...] = field((1, 2, 3, 5), "Channel multiplier of each level")
    residual_blocks: Positive = field(2, "Residual blocks for each level (one more on the way up)")
    attention_factors: tuple[Positive, ...] = field(
        (8, 4, 2), "Down-sampling factors of the latents whose levels have attention"
    )
    middle_attention: bool = field(True, "Attention between the two ways, at the coarsest level")
    heads: Positive | None = field(
        None, "Attention heads of every level (default: --unet.head-channels decides)"
    )
    head_channels: Positive | None = field(None, "Width of an attention head (default: one head)")
    qk_norm: bool = field(
        False, "RMS norms on queries and keys, which keep large learning rates and bfloat16 stable"
    )
    transformer_depth: Annotated[tuple[Positive, ...], BeforeValidator(listed)] = field(
        (1,), "Blocks of each spatial transformer: one number for all levels, or one for each level"
    )
    context_channels: Positive = field(512, "Width of the tokens that are attended to")
    norm: Literal["group", "rms"] = field(
        "group",
        "Normalisation: group, over groups of channels and all pixels (the paper); rms, by pixel",
    )
    norm_groups: Positive = field(
        32, "Groups of the group normalisations, or the largest number below that divides"
    )
    scale_shift: bool = field(
        False, "The time scales and shifts normalised activations instead of being added to them"
    )
    residual_updown: bool = field(
        False, "Residual blocks that halve and double, instead of a convolution each"
    )
    self_conditioning: bool = field(
        False,
        "The network sees its own earlier estimate of the clean latents, as further channels: half of"
        " the samples of a training step go through it twice",
    )
    dropout: Fraction = field(0.0, "Dropout probability in the residual blocks")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def embedding_width(self) -> int:
        """Of the time embedding."""
        return 4 * self.channels

    @property
    def factors(self) -> tuple[int, ...]:
        """Down-sampling factor of each level, finest first."""
        return tuple(2**level for level in range(len(self.multipliers)))

    @property
    def missing_factors(self) -> tuple[int, ...]:
        """Attention factors that no level has; they do nothing."""
        return tuple(sorted(set(self.attention_factors) - set(self.factors)))

    def heads_of(self, width: int) -> int:
        """Attention heads of a level of so many channels."""
        return self.heads or width // (self.head_channels or width)

    def depth_of(self, level: int) -> int:
        """Blocks of the spatial transformers of a level (0 = finest); the middle has the last's."""
        return self.transformer_depth[level if len(self.transformer_depth) > 1 else 0]

    @model_validator(mode="after")
    def _heads_fit(self) -> "UNetConfig":
        if self.heads and self.head_channels:
            raise ValueError(
                f"--unet.heads {self.heads} and --unet.head-channels {self.head_channels}: give one"
            )
        for width in self.widths:
            if self.head_channels and width % self.head_channels:
                raise ValueError(
                    f"attention heads of {self.head_channels} channels do not divide a level of {width}"
                )
            if self.heads and width % self.heads:
                raise ValueError(f"{self.heads} attention heads do not divide a level of {width}")
        return self

    @model_validator(mode="after")
    def _levels_exist(self) -> "UNetConfig":
        if not self.multipliers:
            raise ValueError("--unet.multipliers is empty: a U-Net has one level or more")
        if len(self.transformer_depth) not in (1, len(self.multipliers)):
            raise ValueError(
                f"--unet.transformer-depth has {len(self.transformer_depth)} numbers for "
                f"{len(self.multipliers)} levels: give one for all, or one for each"
            )
        return self


ParameterizationName = Literal["epsilon", "x0", "v", "flow", "edm"]
ScheduleName = Literal[
    "scaled-linear", "linear", "cosine", "sigmoid", "sigmoid-beta", "flow", "edm"
]
DistributionName = Literal["uniform", "logit-normal", "log-normal"]
WeightingName = Literal["simple", "min-snr", "soft-min-snr", "p2", "debiased", "uncertainty"]
LossKind = Literal["l2", "l1", "huber"]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]

CONTINUOUS: tuple[ScheduleName, ...] = ("flow", "edm")
FIRST_FIELDS = ("timesteps", "beta_start", "beta_end")


class ScheduleConfig(Config):
    """Noise levels, and what the network is told of them (docs/diffusion.md)."""

    kind: Literal["auto", ScheduleName] = field(
        "auto",
        "Noise levels: discrete (scaled-linear is the paper's) or continuous (flow, edm); auto = flow"
        " and edm for the parameterizations of that name, else scaled-linear",
    )
    timesteps: Positive = field(1000, "Discrete: number of noise levels T")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = field(
        0.0015, "Linear kinds and sigmoid-beta: noise variance of step 1"
    )
    beta_end: Annotated[float, Field(gt=0, lt=1)] = field(
        0.0195, "Linear kinds and sigmoid-beta: noise variance of step T"
    )
    zero_terminal_snr: bool = field(
        False, "Discrete: stretch the levels so that the last one is pure noise"
    )
    shift: Above0 = field(
        1.0, "Flow: resolution shift a of the time s, a s / (1 + (a - 1) s); 1 = none"
    )
    sigma_min: Above0 = field(0.004, "edm: least noise, in standard deviations of the latents")
    sigma_max: Above0 = field(160.0, "edm: most noise, in standard deviations of the latents")
    rho: Above0 = field(
        7.0, "edm: exponent of the sampling steps; larger = more of them at low noise"
    )

    @model_validator(mode="after")
    def _range_rises(self) -> "ScheduleConfig":
        if self.sigma_min >= self.sigma_max:
            raise ValueError("--schedule.sigma-min must lie below --schedule.sigma-max")
        return self

    @model_serializer(mode="wrap")
    def _as_first_written(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Later fields stand in files only where they say something, so that older files keep their bytes."""
        defaults = {name: info.default for name, info in type(self).model_fields.items()}
        return {
            name: value
            for name, value in handler(self).items()
            if name in FIRST_FIELDS or value != defaults[name]
        }


class NoiseDrawConfig(Config):
    """Which noise levels training sees."""

    distribution: Literal["auto", DistributionName] = field(
        "auto",
        "Uniform in the schedule's own time, logit-normal in it, or sigma log-normal; auto = uniform for"
        " discrete schedules, logit-normal for flow, log-normal for edm",
    )
    logit_mean: Finite = field(0.0, "Logit-normal: mean of logit(time); above 0 = more noise")
    logit_std: Above0 = field(1.0, "Logit-normal: standard deviation of logit(time)")
    log_mean: Finite = field(
        -0.507, "Log-normal: mean of ln(sigma), sigma in standard deviations of the latents"
    )
    log_std: Above0 = field(1.2, "Log-normal: standard deviation of ln(sigma)")
    stratified: bool = field(
        False,
        "Draw one level from each of as many equal parts of the distribution as a batch has samples",
    )


class ObjectiveConfig(Config):
    """What training minimises (docs/diffusion.md has formulas and sources)."""

    loss: LossKind = field("l2", "Distance between the network's prediction and its target")
    huber_c: Above0 = field(
        0.1, "Huber: error of the prediction at which the square turns into a line"
    )
    weighting: WeightingName = field(
        "simple", "Weight of the noise levels; simple = that of the parameterization's own paper"
    )
    min_snr_gamma: Above0 = field(
        5.0, "min-snr, soft-min-snr: largest weight of the clean latents' squared error"
    )
    p2_k: Above0 = field(1.0, "p2: signal-to-noise ratio k below which the weight stays flat")
    p2_gamma: Weight = field(1.0, "p2: how fast the weight falls above k; 0 = not at all")
    offset_noise: Weight = field(
        0.0, "Standard deviation of noise that is one number for each channel; 0 = none"
    )
    input_perturbation: Weight = field(
        0.0, "Further noise in the input alone, as a share of sigma (0.1 in its paper); 0 = none"
    )
    draw: NoiseDrawConfig = NoiseDrawConfig()


def schedule_name(schedule: ScheduleConfig, parameterization: ParameterizationName) -> ScheduleName:
    """The kind of schedule that `auto` stands for beside this parameterization."""
    if schedule.kind != "auto":
        return schedule.kind
    return parameterization if parameterization in ("flow", "edm") else "scaled-linear"


def require_fitting(schedule: ScheduleConfig, parameterization: ParameterizationName) -> None:
    """Raise ValueError where a schedule and a parameterization cannot go together."""
    name = schedule_name(schedule, parameterization)
    if schedule.zero_terminal_snr and name in CONTINUOUS:
        raise ValueError(
            f"--schedule.zero-terminal-snr is for discrete schedules, not {name}: leave it out"
        )
    if parameterization == "epsilon" and (schedule.zero_terminal_snr or name == "flow"):
        culprit = "--schedule.kind flow" if name == "flow" else "--schedule.zero-terminal-snr"
        raise ValueError(
            f"{culprit} ends at pure noise, where the noise predicted by --parameterization epsilon says"
            " nothing of the picture: take v, x0 or flow"
        )


Width = Annotated[float, Field(gt=0, le=0.288)]
"""Relative width of a power-function average; 1/sqrt(12) would weigh all steps alike."""
SnapshotFormat = Literal["float32", "float16"]


class AverageConfig(Config):
    """The averages of the weights over training; one of them becomes the model."""

    kind: Literal["ema", "power"] = field(
        "ema",
        "How the saved weights are averaged: exponential with warm-up, or by a power of the step, so"
        " that the width grows with the run (Karras et al. 2024)",
    )
    decay: Fraction = field(0.9999, "Decay of kind ema (warmed up)")
    width: Width = field(
        0.05, "Width of kind power: standard deviation of what it weighs, as a share of the steps"
    )
    snapshots: Count = field(
        0,
        "Steps between snapshots in OUT/averages, from which `ldmkit ema` makes any other width; each"
        " takes twice the room of the model, and training memory for two more copies; 0 = none",
    )
    snapshot_format: SnapshotFormat = field("float32", "Number format of the weights in snapshots")


class DiffusionConfig(Config):
    """What a diffusion model file stores to build its network again."""

    unet: UNetConfig
    schedule: ScheduleConfig
    parameterization: ParameterizationName
    latent_channels: Positive
    conditions: tuple[ConditionConfig, ...]
    """What the model is told."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "DiffusionConfig":
        require_fitting(self.schedule, self.parameterization)
        return self
