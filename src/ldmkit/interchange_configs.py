"""Configs of the commands that exchange models with other projects.

Imports no torch.
"""

from pathlib import Path
from typing import Literal

from ldmkit.fields import Config, Positive, argument, field


class ImportConfig(Config):
    """Turn an autoencoder of another project (one file, or a diffusers folder) into a file of ldmkit."""

    source: Path = argument(
        "File of the original layout (.safetensors, .ckpt, .pt, .pth), or folder of diffusers"
    )
    out: Path = field(Path("runs/ae/autoencoder.safetensors"), "Autoencoder file", short="-o")
    size: Positive | None = field(
        None, "Picture size it was trained on, pixels (default: what the source says, or 256)"
    )


class ExportConfig(Config):
    """Write an autoencoder so that other projects read it, and check that by running both."""

    ae: Path = argument("Autoencoder file")
    to: Literal["diffusers", "ldm"] = field(
        "diffusers", "A folder for diffusers, or one file in the original layout and a .yaml beside"
    )
    out: Path = field(Path("runs/exported"), "Folder, or file (ldm)", short="-o")
    latents: Path | None = field(
        None, "Latent set of this autoencoder, whose statistics become the scale of the latents"
    )
    scale: Literal["scalar", "channel"] = field(
        "scalar",
        "That scale: scaling_factor and shift_factor, or latents_mean and latents_std for each "
        "channel (read by fewer pipelines of diffusers)",
    )
