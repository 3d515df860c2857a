"""A diffusion model and its autoencoder as one file of the original code, with its config beside."""

import json
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from ldmkit.assembly import (
    autoencoder_facts,
    diffusion_facts,
    load_autoencoder,
    load_diffusion,
    require_same_autoencoder,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.diffusion.schedule import DiscreteSchedule
from ldmkit.diffusion_configs import DiffusionConfig, schedule_name
from ldmkit.durable import atomic_file
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, Facts
from ldmkit.interchange_configs import ImportConfig
from ldmkit.interop import ldm_layout
from ldmkit.interop.layout import Tensors
from ldmkit.interop.ldm_model import CLASS_TABLE, DESCRIPTION_KEY, LABEL, SCALE, read_checkpoint
from ldmkit.interop.ldm_schedule import schedule_buffers
from ldmkit.interop.ldm_whitening import with_one_scale
from ldmkit.interop.parity import MIN_SIDE, TOLERANCE
from ldmkit.interop.reading import LEGACY_KEY, RESOLUTION_KEY, read_tensors
from ldmkit.interop.unet_layout import LDM_PREFIX, UNET_LDM, to_foreign_unet
from ldmkit.latent_diffusion import LatentDiffusion
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


def export_whole_model(diffusion: Path, ae: Path | None, out: Path) -> Path:
    """Write both stages as one checkpoint of the original code, and prove it by reading it back.

    The weights are those of the model file, which are the averaged ones: there is no second copy as
    `model_ema.*`. Latents are scaled by one number there. Where ours are whitened by channel, the
    whitening goes into the 1x1 convolutions around the latents, which is exact.

    Args:
        diffusion: the diffusion model's file.
        ae: file of its autoencoder.
        out: where to write.

    Returns:
        The file; its `.yaml` lies beside it.

    Raises:
        DataError: the layout cannot express the model, or what was written differs.
        UsageError: the output is not one file, or the autoencoder is not given.
    """
    if ae is None:
        raise UsageError(
            "--to ldm writes both stages as one file: give the autoencoder's with --ae FILE"
        )
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: the ldm layout is one file, name it *.safetensors")
    facts = diffusion_facts(diffusion)
    require_same_autoencoder(facts.autoencoder, ae, f"the latents of {diffusion}")
    model, stage = load_diffusion(diffusion), autoencoder_facts(ae)
    _require_expressible(model, facts, str(diffusion))
    autoencoder = load_autoencoder(ae)
    if autoencoder.config.bottleneck == "identity":
        raise DataError(f"{ae} has no networks (bottleneck identity): nothing to export")
    scaled, scale = with_one_scale(autoencoder, model.latent_mean, model.latent_std)
    tensors = whole_tensors(model, scaled, autoencoder, scale)
    metadata = {
        "format": "pt",  # other readers insist on it
        LEGACY_KEY: "true" if autoencoder.config.codebook.legacy_commitment else "false",
        RESOLUTION_KEY: str(facts.latent_shape[1] * stage.factor),
        DESCRIPTION_KEY: json.dumps(_description(model.config, facts)),
    }
    page = _config_page(model, facts, scale)
    page += _first_stage_page(autoencoder, stage.preprocessing)
    with atomic_file(out.with_suffix(".yaml")) as beside, atomic_file(out) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)
        difference = _compare(model, autoencoder, temporary)
        if not all(value <= TOLERANCE for value in difference):
            raise DataError(
                f"{out} as it is read back differs from the model ({difference}; allowed "
                f"{TOLERANCE:g}): nothing was written"
            )
        beside.write_text(page, encoding="utf-8")
    say(f"largest differences as it is read back: {difference}")
    say(f"{out.with_suffix('.yaml')} beside it has the config; its weights are the averaged ones")
    return out


def _require_expressible(model: LatentDiffusion, facts: DiffusionFacts, source: str) -> None:
    """Check that the layout has a word for what the U-Net's own check does not look at.

    Raises:
        DataError: it has none for something; it is named.
    """
    config = model.config
    kind = schedule_name(config.schedule, config.parameterization)
    parts = ("unet.", "latent_mean", "latent_std", LABEL)
    further = sorted(name for name in model.state_dict() if not name.startswith(parts))
    foreign = {
        f"the parameterization {config.parameterization}": config.parameterization
        not in PARAMETERIZATIONS,
        f"the schedule {kind}": kind not in SCHEDULES,
        "zero terminal SNR": config.schedule.zero_terminal_snr,
        f"{further[0] if further else ''}": bool(further),
        f"latents of {facts.latent_shape[1]} x {facts.latent_shape[2]}, which are not square": (
            facts.latent_shape[1] != facts.latent_shape[2]
        ),
    }
    for what, present in foreign.items():
        if present:
            raise DataError(f"{source}: the ldm layout has no word for {what}")


def whole_tensors(
    model: LatentDiffusion, scaled: Tensors, autoencoder: Autoencoder, scale: float
) -> Tensors:
    """Every tensor of the checkpoint.

    Args:
        model: the diffusion model.
        scaled: the autoencoder's tensors under our names; latents times `scale` are what diffusion sees.
        autoencoder: whose config they follow.
        scale: see there.

    Raises:
        DataError: the layout has no word for something in a config; it is named.
    """
    theirs = to_foreign_unet(model.unet, UNET_LDM)
    tensors = {LDM_PREFIX + name: tensor for name, tensor in theirs.items()}
    stage = ldm_layout.to_ldm(scaled, autoencoder.config)
    tensors |= {FIRST_STAGE_PREFIX + name: tensor for name, tensor in stage.items()}
    if model.label is not None:
        tensors[CLASS_TABLE] = model.state_dict()[LABEL]
    if isinstance(model.schedule, DiscreteSchedule):
        tensors |= schedule_buffers(model.schedule)
    tensors[SCALE] = torch.tensor(scale)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _description(config: DiffusionConfig, facts: DiffusionFacts) -> Facts:
    unet = config.unet
    width = unet.head_channels
    return {
        # one head for each level is what neither says, and the layout's heads are one number
        "heads": unet.heads or (None if width else 1),
        "head_channels": width,
        "parameterization": config.parameterization,
        **({"class_names": facts.class_names} if config.classes else {}),
    }


@torch.no_grad()
def _compare(model: LatentDiffusion, autoencoder: Autoencoder, written: Path) -> Difference:
    """Run both stages of the model and of the file on one random picture, noise level and label."""
    back = read_checkpoint(*read_tensors(written), ImportConfig(source=written))
    other, stage = back.model, back.first_stage
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
    label = torch.zeros(1, dtype=torch.int64)
    denoised = [m.denoise(noisy, sigma, m.condition(label)) for m in (model, other)]
    denoise = (denoised[0] - denoised[1]).abs().max().item()
    if autoencoder.codebook is not None:  # a latent halfway between two codes falls to either
        mine = model.whiten(autoencoder.codebook.quantize(raw))
    decoded = autoencoder.decode(model.unwhiten(mine)) - stage.model.decode(other.unwhiten(mine))
    return Difference(encode, denoise, decoded.abs().max().item())


def _config_page(model: LatentDiffusion, facts: DiffusionFacts, scale: float) -> str:
    """What the published code needs beside the tensors, as the YAML that it reads."""
    config, unet, schedule = model.config, model.config.unet, model.config.schedule
    told = config.classes > 0
    kind = schedule_name(schedule, config.parameterization)
    z, side, _ = facts.latent_shape
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
        *(transformer if told else []),
    ]
    table = [
        "    cond_stage_config:",
        "      target: ldm.modules.encoders.modules.ClassEmbedder",
        "      params:",
        f"        embed_dim: {unet.context_channels}",
        f"        n_classes: {config.classes + 1}",
        "        key: class_label",
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
        f"    conditioning_key: {'crossattn' if told else 'null'}",
        *(table if told else ["    cond_stage_config: __is_unconditional__"]),
        "    unet_config:",
        "      target: ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "      params:",
        *(f"        {line}" for line in network),
    ]
    return "\n".join(lines) + "\n"


def _first_stage_page(autoencoder: Autoencoder, preprocessing: PreprocessingConfig) -> str:
    page = ldm_layout.config_page(autoencoder.config, preprocessing)
    page = page.replace(".VQModel\n", ".VQModelInterface\n")
    lines = ["  first_stage_config:", *page.splitlines()[1:]]
    return "".join(f"  {line}\n" if n == 0 else f"    {line}\n" for n, line in enumerate(lines))
