"""A diffusion model and its autoencoder as one file of the original code, with its config beside."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.condition_configs import ClassCondition
from ldmkit.diffusion.schedule import DiscreteSchedule
from ldmkit.diffusion_configs import DiffusionConfig, schedule_name
from ldmkit.durable import atomic_file
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import Facts
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop import ldm_layout
from ldmkit.interop.class_tables import TABLE, values_of_classes
from ldmkit.interop.latent_scale import Scaled, whitening_of, with_one_scale
from ldmkit.interop.layout import Tensors
from ldmkit.interop.ldm_model import CLASS_TABLE, DESCRIPTION_KEY, SCALE, read_checkpoint
from ldmkit.interop.ldm_schedule import schedule_buffers
from ldmkit.interop.parity import MIN_SIDE, TOLERANCE
from ldmkit.interop.reading import LEGACY_KEY, RESOLUTION_KEY
from ldmkit.interop.sources import open_source
from ldmkit.interop.unet_layout import LDM_PREFIX, UNET_LDM, to_foreign_unet
from ldmkit.interop.whole_export import BothStages
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import write_tensors
from ldmkit.terminal import say

FIRST_STAGE_PREFIX = "first_stage_model."
PARAMETERIZATIONS = {"epsilon": "eps", "x0": "x0", "v": "v"}
SCHEDULES = {"scaled-linear": "linear", "linear": "sqrt_linear", "cosine": "cosine"}
"""Ours -> what the original code calls them."""


class Difference(NamedTuple):
    """Largest absolute differences between a model and what was written of it."""

    encode: float
    """Of whitened latents."""
    denoise: float
    decode: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.2g}" for name, value in self._asdict().items())


def export_checkpoint(both: BothStages, out: Path) -> None:
    """Write both stages as one checkpoint of the original code, and prove it by reading it back.

    The weights are those of the model file, which are the averaged ones: there is no second copy as
    `model_ema.*`. Latents are scaled by one number there. Where ours are whitened by channel, the
    whitening goes into the 1x1 convolutions around the latents, which is exact.

    Args:
        both: what to write.
        out: the file; its `.yaml` lies beside it.

    Raises:
        DataError: the layout cannot express the model, or what was written differs.
        UsageError: the output is not one file.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: the ldm layout is one file, name it *.safetensors")
    _require_expressible(both)
    scaled = with_one_scale(both.autoencoder, both.facts.whitening)
    if scaled is None:
        raise DataError(
            "the latents of this model are whitened by channel and its autoencoder has a codebook: the "
            "ldm layout scales latents by one number before the nearest code is looked up"
        )
    tensors = whole_tensors(both.model, both.told, scaled)
    legacy = both.autoencoder.config.codebook.legacy_commitment
    metadata = {
        "format": "pt",  # other readers insist on it
        LEGACY_KEY: "true" if legacy else "false",
        RESOLUTION_KEY: str(both.facts.latent_shape[1] * both.autoencoder.config.factor),
        DESCRIPTION_KEY: json.dumps(_description(both.model.config, both.told)),
    }
    page = _config_page(both, scaled.factor)
    page += _first_stage_page(both.autoencoder, both.preprocessing)
    with atomic_file(out.with_suffix(".yaml")) as beside, atomic_file(out) as temporary:
        write_tensors(temporary, tensors, metadata)
        difference = _compare(both.model, both.autoencoder, temporary)
        if not all(value <= TOLERANCE for value in difference):
            raise DataError(
                f"{out} as it is read back differs from the model ({difference}; allowed "
                f"{TOLERANCE:g}): nothing was written"
            )
        beside.write_text(page, encoding="utf-8")
    say(f"largest differences as it is read back: {difference}")
    say(f"{out.with_suffix('.yaml')} beside it has the config; its weights are the averaged ones")


def _require_expressible(both: BothStages) -> None:
    """Check that the layout has a word for what the U-Net's own check does not look at.

    Raises:
        DataError: it has none for something; it is named.
    """
    config, (_, height, width) = both.model.config, both.facts.latent_shape
    kind = schedule_name(config.schedule, config.parameterization)
    foreign = {
        f"the parameterization {config.parameterization}": config.parameterization
        not in PARAMETERIZATIONS,
        f"the schedule {kind}": kind not in SCHEDULES,
        "zero terminal SNR": config.schedule.zero_terminal_snr,
        f"latents of {height} x {width}, which are not square": height != width,
    }
    for what, present in foreign.items():
        if present:
            raise DataError(f"{both.source}: the ldm layout has no word for {what}")


def whole_tensors(model: LatentDiffusion, told: ClassCondition | None, scaled: Scaled) -> Tensors:
    """Every tensor of the checkpoint.

    Args:
        model: the diffusion model.
        told: its classes.
        scaled: the autoencoder, and the number that its latents are multiplied by.

    Raises:
        DataError: the layout has no word for something in a config; it is named.
    """
    theirs = to_foreign_unet(model.unet, UNET_LDM)
    tensors = {LDM_PREFIX + name: tensor for name, tensor in theirs.items()}
    stage = ldm_layout.to_ldm(scaled.autoencoder.state_dict(), scaled.autoencoder.config)
    tensors |= {FIRST_STAGE_PREFIX + name: tensor for name, tensor in stage.items()}
    if told is not None:
        name = CLASS_TABLE if told.attended else LDM_PREFIX + UNET_LDM.class_table
        tensors[name] = model.state_dict()[TABLE]
    if isinstance(model.schedule, DiscreteSchedule):
        tensors |= schedule_buffers(model.schedule)
    tensors[SCALE] = torch.tensor(scaled.factor)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _description(config: DiffusionConfig, told: ClassCondition | None) -> Facts:
    unet = config.unet
    width = unet.head_channels
    return {
        # one head for each level is what neither says, and the layout's heads are one number
        "heads": unet.heads or (None if width else 1),
        "head_channels": width,
        "parameterization": config.parameterization,
        **({"class_names": told.names} if told else {}),
    }


@torch.no_grad()
def _compare(model: LatentDiffusion, autoencoder: Autoencoder, written: Path) -> Difference:
    """Run both stages of the model and of the file on one random picture, noise level and label."""
    back = read_checkpoint(open_source(written), ImportConfig(source=written))
    other, stage = back.model, back.first_stage
    other.set_whitening(whitening_of(back.scaling, other.config.latent_channels, str(written)))
    assert stage is not None  # noqa: S101 - it was written a moment ago
    generator = torch.Generator().manual_seed(0)
    unit = autoencoder.config.factor * 2 ** (len(model.config.unet.multipliers) - 1)
    side = unit * -(-MIN_SIDE // unit)
    images = torch.rand(1, autoencoder.image_channels, side, side, generator=generator) * 2 - 1
    raw = autoencoder.encode(images).mean
    theirs = other.whiten(stage.model.encode(images).mean)
    mine = model.whiten(raw)
    encode = (mine - theirs).abs().max().item()
    sigma = model.schedule.sigma_at(torch.tensor([0.5], dtype=torch.float64)).float()
    noisy = mine + sigma * torch.randn(mine.shape, generator=generator)
    told = values_of_classes(model, torch.zeros(1, dtype=torch.int64))
    denoised = [m.denoise(noisy, sigma, m.condition(told)) for m in (model, other)]
    denoise = (denoised[0] - denoised[1]).abs().max().item()
    if autoencoder.codebook is not None:  # a latent halfway between two codes falls to either
        mine = model.whiten(autoencoder.codebook.quantize(raw))
    decoded = autoencoder.decode(model.unwhiten(mine)) - stage.model.decode(other.unwhiten(mine))
    return Difference(encode, denoise, decoded.abs().max().item())


def _config_page(both: BothStages, scale: float) -> str:
    """What the published code needs beside the tensors, as the YAML that it reads."""
    config, told = both.model.config, both.told
    unet, schedule = config.unet, config.schedule
    kind = schedule_name(schedule, config.parameterization)
    z, side, _ = both.facts.latent_shape
    heads = f"num_head_channels: {unet.head_channels}"
    transformer = [
        "use_spatial_transformer: true",
        f"transformer_depth: {unet.transformer_depth[0]}",
        f"context_dim: {unet.context_channels}",
    ]
    network = [
        f"image_size: {side}",
        f"in_channels: {z}",
        f"out_channels: {z}",
        f"model_channels: {unet.channels}",
        f"channel_mult: {list(unet.multipliers)}",
        f"num_res_blocks: {unet.residual_blocks}",
        f"attention_resolutions: {sorted(unet.attention_factors, reverse=True)}",
        heads if unet.head_channels else f"num_heads: {unet.heads or 1}",
        f"use_scale_shift_norm: {str(unet.scale_shift).lower()}",
        f"resblock_updown: {str(unet.residual_updown).lower()}",
        f"dropout: {unet.dropout}",
        "legacy: false",
        *(transformer if both.model.unet.use_tokens else []),
        *([f"num_classes: {len(told.names) + 1}"] if told and not told.attended else []),
    ]
    lines = [
        "model:",
        "  target: ldm.models.diffusion.ddpm.LatentDiffusion",
        "  params:",
        f"    timesteps: {schedule.timesteps}",
        f"    beta_schedule: {SCHEDULES[kind]}",
        f"    linear_start: {schedule.beta_start}",
        f"    linear_end: {schedule.beta_end}",
        f"    parameterization: {PARAMETERIZATIONS[config.parameterization]}",
        f"    image_size: {side}",
        f"    channels: {z}",
        f"    scale_factor: {scale!r}",
        "    use_ema: false",
        "    first_stage_key: image",
        "    cond_stage_key: class_label",
        *_condition_lines(told, unet.context_channels),
        "    unet_config:",
        "      target: ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "      params:",
        *(f"        {line}" for line in network),
    ]
    return "\n".join(lines) + "\n"


def _condition_lines(told: ClassCondition | None, width: int) -> list[str]:
    """How the published code makes conditions of class numbers."""
    if told is None:
        return ["    conditioning_key: null", "    cond_stage_config: __is_unconditional__"]
    if not told.attended:  # the U-Net has the table, and takes numbers
        return [
            "    conditioning_key: adm",
            "    cond_stage_config:",
            "      target: torch.nn.Identity",
        ]
    return [
        "    conditioning_key: crossattn",
        "    cond_stage_config:",
        "      target: ldm.modules.encoders.modules.ClassEmbedder",
        "      params:",
        f"        embed_dim: {width}",
        f"        n_classes: {len(told.names) + 1}",
        "        key: class_label",
    ]


def _first_stage_page(autoencoder: Autoencoder, preprocessing: PreprocessingConfig) -> str:
    page = ldm_layout.config_page(autoencoder.config, preprocessing)
    page = page.replace(".VQModel\n", ".VQModelInterface\n")
    lines = ["  first_stage_config:", *page.splitlines()[1:]]
    return "".join(f"  {line}\n" if n == 0 else f"    {line}\n" for n, line in enumerate(lines))
