"""Configs of the commands that exchange models with other projects.

Imports no torch.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldmkit.fields import Config, Positive, argument, field


class ImportConfig(Config):
    """Turn an autoencoder or a whole latent diffusion model of another project into files of ldmkit."""

    source: Path = argument(
        "File of the original layout (.safetensors, .ckpt, .pt, .pth), or folder of diffusers"
    )
    out: Path | None = field(
        None,
        "Autoencoder file (default: runs/ae/autoencoder.safetensors); for a whole model the folder of"
        " its two files (default: runs/imported), or NAME.safetensors for its autoencoder alone",
        short="-o",
    )
    size: Positive | None = field(
        None, "Picture size it was trained on, pixels (default: what the source says, or 256)"
    )
    ae: Path | None = field(
        None, "Whole model: autoencoder file of its latents (default: the source's own autoencoder)"
    )
    weights: Literal["auto", "ema", "plain"] = field(
        "auto",
        "Whole model in a file: averaged or plain weights of the U-Net; auto = averaged if there are"
        " any",
    )
    parameterization: Literal["epsilon", "x0", "v"] | None = field(
        None, "Whole model: what its U-Net predicts (default: what the source says, or epsilon)"
    )
    heads: Positive | None = field(
        None,
        "Whole model in a file: attention heads of every level (default: those of the published model"
        " of this shape, where there is one)",
    )
    head_channels: Positive | None = field(None, "Whole model in a file, instead: width of a head")
    scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = field(
        None,
        "Whole model: what raw latents were multiplied by (default: what the source, or else the file"
        " of --ae, says)",
    )
    null_class: Literal["auto", "last", "none"] = field(
        "auto",
        "Whole model: whether the last row of its table of classes stands for no class; auto = known"
        " for ImageNet's 1000 (none) and 1001 rows (last)",
    )

    @model_validator(mode="after")
    def _heads_are_given_once(self) -> "ImportConfig":
        if self.heads and self.head_channels:
            raise ValueError(
                f"--heads {self.heads} and --head-channels {self.head_channels}: give one"
            )
        return self


class ExportConfig(Config):
    """Write a model so that other projects read it, and check that by running both."""

    model: Path = argument("Autoencoder or diffusion model file")
    ae: Path | None = field(None, "Diffusion model: autoencoder file of its latents")
    to: Literal["diffusers", "ldm"] = field(
        "diffusers", "A folder for diffusers, or one file in the original layout and a .yaml beside"
    )
    out: Path = field(Path("runs/exported"), "Folder, or file (ldm)", short="-o")
    latents: Path | None = field(
        None, "Autoencoder: latent set of its own, whose statistics become the scale of the latents"
    )
    scale: Literal["scalar", "channel"] = field(
        "scalar",
        "That scale: scaling_factor and shift_factor, or latents_mean and latents_std for each "
        "channel (read by fewer pipelines of diffusers)",
    )
