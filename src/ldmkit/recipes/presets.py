"""`ldmkit presets`: the named settings, how large their networks are and where they come from."""

from typing import Any

import torch

from ldmkit.assembly import build_autoencoder
from ldmkit.configs import PresetsConfig, TrainAEConfig
from ldmkit.diffusion_configs import UNetConfig
from ldmkit.diffusion_presets import Use
from ldmkit.named_settings import PRESETS
from ldmkit.networks.unet import UNet

SCHEMA_VERSION = 1


def presets(config: PresetsConfig) -> dict[str, Any]:
    """All presets of the commands asked for.

    Returns:
        `{"schema_version": 1, "presets": [...]}`; each has command, name, source and parameters. An
        autoencoder has its down-sampling factor, latent channels and codebook size too (None
        without); a diffusion model (whose parameters are its U-Net's) the latents it is meant for,
        the channels beside them, what it attends to ("" for nothing), and the number of parameters
        published (None where there is none) with that of parts outside the U-Net counted in it.
    """
    found = []
    for command, named in PRESETS.items():
        if config.command in (command, None):
            for name, preset in named.items():
                size = (
                    _size(preset.settings)
                    if preset.use is None
                    else _unet_size(preset.settings, preset.use)
                )
                found.append({"command": command, "name": name, **size, "source": preset.source})
    return {"schema_version": SCHEMA_VERSION, "presets": found}


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    header = ("command", "preset", "parameters", "f", "z", "codes", "source")
    rows = [
        (
            preset["command"],
            preset["name"],
            *(
                _shown(preset.get(key))
                for key in ("parameters", "factor", "latent_channels", "codes")
            ),
            preset["source"],
        )
        for preset in report["presets"]
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _size(settings: dict[str, Any]) -> dict[str, Any]:
    config = TrainAEConfig.model_validate({"data": "x", **settings})
    with torch.device("meta"):
        model = build_autoencoder(config.autoencoder, config.preprocessing)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "factor": config.autoencoder.factor,
        "latent_channels": model.latent_channels,
        "codes": config.autoencoder.codebook.size if model.codebook is not None else None,
    }


def _unet_size(settings: dict[str, Any], use: Use) -> dict[str, Any]:
    with torch.device("meta"):
        model = UNet(
            UNetConfig.model_validate(settings["unet"]),
            in_channels=use.latents[0] + use.concatenated,
            out_channels=use.latents[0],
            use_tokens=bool(use.tokens),
        )
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latent_channels": use.latents[0],
        **use._asdict(),
    }


def _shown(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
