"""Configs of the second stage: its network, noise schedule and what its file stores.

Imports no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ldmkit.fields import Config, Count, Fraction, Positive, field


def _listed(depth: Any) -> Any:  # noqa: ANN401 - checked by the field's own type afterwards
    return (depth,) if isinstance(depth, int) else depth


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
    transformer_depth: Annotated[tuple[Positive, ...], BeforeValidator(_listed)] = field(
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
        False, "The network sees its own earlier estimate, as further channels"
    )
    dropout: Fraction = field(0.0, "Dropout probability in the residual blocks")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def factors(self) -> tuple[int, ...]:
        """Down-sampling factor of each level, finest first."""
        return tuple(2**level for level in range(len(self.multipliers)))

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
        if missing := sorted(set(self.attention_factors) - set(self.factors)):
            raise ValueError(
                f"--unet.attention-factors {missing[0]}: no level has that factor; the "
                f"{len(self.factors)} levels have {', '.join(map(str, self.factors))} (factors of the "
                "latents, not sides in pixels)"
            )
        if len(self.transformer_depth) not in (1, len(self.multipliers)):
            raise ValueError(
                f"--unet.transformer-depth has {len(self.transformer_depth)} numbers for "
                f"{len(self.multipliers)} levels: give one for all, or one for each"
            )
        return self


ParameterizationName = Literal["epsilon", "v"]


class ScheduleConfig(Config):
    """Discrete noise schedule: variances linear in their square root (Rombach et al. 2022)."""

    timesteps: Positive = field(1000, "Number of noise levels T")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = field(0.0015, "Noise variance of step 1")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = field(0.0195, "Noise variance of step T")


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
    classes: Count
    """Number of classes; 0 for a model without class condition."""
