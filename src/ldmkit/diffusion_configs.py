"""Configs of the second stage: its network, noise schedule and what its file stores.

Imports no torch.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldmkit.fields import Config, Count, Fraction, Positive, field


class UNetConfig(Config):
    """The network of the second stage (Dhariwal and Nichol 2021; Rombach et al. 2022, App. E)."""

    channels: Positive = field(192, "Channels of the finest level")
    multipliers: tuple[Positive, ...] = field((1, 2, 3, 5), "Channel multiplier of each level")
    residual_blocks: Positive = field(2, "Residual blocks for each level (one more on the way up)")
    attention_factors: tuple[Positive, ...] = field(
        (8, 4, 2), "Down-sampling factors of the latents whose levels have attention"
    )
    head_channels: Positive | None = field(None, "Width of an attention head (default: one head)")
    transformer_depth: Positive = field(1, "Blocks of each spatial transformer")
    norm_groups: Positive = field(
        32, "Groups of the group normalisations, or the largest number below that divides"
    )
    context_channels: Positive = field(512, "Width of the tokens that are attended to")
    dropout: Fraction = field(0.0, "Dropout probability in the residual blocks")

    @model_validator(mode="after")
    def _heads_fit(self) -> "UNetConfig":
        for width in (self.channels * multiplier for multiplier in self.multipliers):
            if self.head_channels and width % self.head_channels:
                raise ValueError(
                    f"attention heads of {self.head_channels} channels do not divide a level of {width}"
                )
        return self


ParameterizationName = Literal["epsilon", "v"]


class ScheduleConfig(Config):
    """Discrete noise schedule: variances linear in their square root (Rombach et al. 2022)."""

    timesteps: Positive = field(1000, "Number of noise levels T")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = field(0.0015, "Noise variance of step 1")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = field(0.0195, "Noise variance of step T")


class DiffusionConfig(Config):
    """What a diffusion model file stores to build its network again."""

    unet: UNetConfig
    schedule: ScheduleConfig
    parameterization: ParameterizationName
    latent_channels: Positive
    classes: Count
    """Number of classes; 0 for a model without class condition."""
