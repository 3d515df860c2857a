"""The folder layout of Hugging Face diffusers: `AutoencoderKL` and `VQModel`.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`. What its converters from the
ldm layout lose, attention in the levels, is kept here: `AttnDownEncoderBlock2D` says it.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.errors import DataError
from ldmkit.facts import Statistics, validated
from ldmkit.fields import Config, Positive
from ldmkit.interop.bottleneck import POST, QUANT, shape, squared, with_certain_noise
from ldmkit.interop.layout import Imported, Layout, Tensors, to_foreign, to_model
from ldmkit.networks.blocks import Norm

DIFFUSERS = Layout(
    block="{half}.{way}_blocks.{step}.resnets.{number}",
    attention="{half}.{way}_blocks.{step}.attentions.{number}",
    resample="{half}.{way}_blocks.{step}.{way}samplers.0.conv",
    middle_block="{half}.mid_block.resnets.{number}",
    middle_attention="{half}.mid_block.attentions.0",
    block_parts={"skip": "conv_shortcut"},
    attention_parts={
        "norm": ("group_norm",),
        "qkv": ("to_q", "to_k", "to_v"),
        "out": ("to_out.0",),
    },
    outside={
        "to_moments": "quant_conv",
        "from_latents": "post_quant_conv",
        "codebook.codes": "quantize.embedding.weight",
        "encoder.norm_out": "encoder.conv_norm_out",
        "decoder.norm_out": "decoder.conv_norm_out",
    },
    linear_attention=True,
)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.(\w+)")
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
ATTENTION = "Attn"  # stands before either of them
Finite = Annotated[float, Field(allow_inf_nan=False)]
CLASSES = ("AutoencoderKL", "VQModel")


class DiffusersConfig(Config):
    """What a `config.json` of either class may say, with the defaults of diffusers; strict."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = (DOWN,)
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = (UP,)
    block_out_channels: tuple[Positive, ...] = Field((64,), min_length=1)
    layers_per_block: Positive = 1
    act_fn: Literal["silu", "swish"] = "silu"
    latent_channels: Positive | None = None
    norm_num_groups: Positive = 32
    sample_size: Positive | tuple[Positive, ...] = 32
    scaling_factor: Finite | None = None
    shift_factor: Finite | None = None
    latents_mean: Statistics | None = None
    latents_std: Statistics | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    num_vq_embeddings: Positive = 256
    vq_embed_dim: Positive | None = None
    norm_type: Literal["group"] = "group"
    lookup_from_codebook: bool = False


def from_diffusers(
    tensors: Tensors, page: dict[str, Any], source: str, *, legacy_commitment: bool = True
) -> Imported:
    """The autoencoder of a folder.

    Args:
        tensors: of its weights file.
        page: its `config.json`.
        source: how to name it in errors.
        legacy_commitment: how its codebook was trained; diffusers itself does it the legacy way.

    Raises:
        DataError: another class, or something that ours cannot express; it is named.
    """
    kind = page.get("_class_name")
    if kind not in CLASSES:
        raise DataError(f"{source} holds {kind}; {' and '.join(CLASSES)} can be imported")
    stated = {key: value for key, value in page.items() if not key.startswith("_")}
    foreign = validated(DiffusersConfig, stated, f"{source}: config.json")
    for wanted, name in ((foreign.use_quant_conv, QUANT), (foreign.use_post_quant_conv, POST)):
        if wanted and f"{name}.weight" not in tensors:
            raise DataError(f"{source} lacks tensor {name}.weight, which its config.json promises")
    mine = squared({new_name(name): tensor for name, tensor in tensors.items()}, source)
    latent_channels = shape(mine, "decoder.conv_in.weight", source)[1]
    config = _config_of(foreign, kind == "VQModel", latent_channels, legacy_commitment, source)
    model = to_model(mine, config, foreign.in_channels, DIFFUSERS, source)
    size = foreign.sample_size
    scaling = foreign.model_dump(
        include={"scaling_factor", "shift_factor", "latents_mean", "latents_std"},
        exclude_none=True,
        mode="json",
    )
    return Imported(model, size if isinstance(size, int) else min(size), scaling, ())


def to_diffusers(tensors: Tensors, config: AutoencoderConfig) -> Tensors:
    """Our tensors in this layout."""
    theirs = to_foreign(tensors, config, DIFFUSERS)
    return with_certain_noise(theirs) if config.bottleneck == "deterministic" else theirs


def config_page(
    config: AutoencoderConfig, preprocessing: PreprocessingConfig, scaling: dict[str, Any]
) -> dict[str, Any]:
    """The `config.json` of an autoencoder of ours.

    Args:
        config: architecture.
        preprocessing: of its pictures.
        scaling: what it is to say of the scale of its latents.

    Raises:
        DataError: diffusers has no word for something in the config; it is named.
    """
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    norm = Norm(config.norm_groups, 0.0)
    groups = {norm.groups_of(width) for width in widths}
    if len(groups) > 1:
        raise DataError(
            f"diffusers has one number of norm groups for all levels; {config.norm_groups} "
            f"gives {', '.join(map(str, sorted(groups)))} in levels of {widths} channels"
        )
    if config.multipliers[0] != 1:
        raise DataError(
            f"diffusers' first convolution is as wide as the first level; here it has "
            f"{config.channels} channels and the level {widths[0]}"
        )
    attends = [2**level in config.attention_factors for level in range(len(widths))]
    vq = config.bottleneck == "vq"
    page: dict[str, Any] = {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": [ATTENTION * attention + DOWN for attention in attends],
        "in_channels": preprocessing.channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.residual_blocks,
        "mid_block_add_attention": config.middle_attention,
        "norm_num_groups": groups.pop(),
        "out_channels": preprocessing.channels,
        "sample_size": preprocessing.size,
        "up_block_types": [ATTENTION * attention + UP for attention in reversed(attends)],
    }
    if vq:
        page |= {
            "num_vq_embeddings": config.codebook.size,
            "vq_embed_dim": config.latent_channels,
            "norm_type": "group",
        }
    return page | scaling


def _config_of(
    foreign: DiffusersConfig, vq: bool, latent_channels: int, legacy: bool, source: str
) -> AutoencoderConfig:
    attends = _attention(foreign, source)
    widths = foreign.block_out_channels
    if any(width % widths[0] for width in widths):
        raise DataError(
            f"{source}: block_out_channels {widths}: not all are multiples of the first"
        )
    if any(width % foreign.norm_num_groups for width in widths):
        raise DataError(
            f"{source}: norm_num_groups {foreign.norm_num_groups} does not divide {widths}"
        )
    if foreign.in_channels != foreign.out_channels or foreign.in_channels not in (1, 3):
        raise DataError(
            f"{source}: in_channels {foreign.in_channels} and out_channels {foreign.out_channels}; "
            "ldmkit has 1 or 3, the same for both"
        )
    if foreign.lookup_from_codebook:
        raise DataError(f"{source}: lookup_from_codebook: it decodes indices, ldmkit latents")
    codebook = {"size": foreign.num_vq_embeddings, "legacy_commitment": legacy} if vq else {}
    settings = {
        "bottleneck": "vq" if vq else "kl",
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "residual_blocks": foreign.layers_per_block,
        "attention_factors": [2**level for level, attention in enumerate(attends) if attention],
        "middle_attention": foreign.mid_block_add_attention,
        "norm_groups": foreign.norm_num_groups,
        "latent_channels": latent_channels,
        "codebook": codebook,
    }
    return validated(AutoencoderConfig, settings, source)


def _attention(foreign: DiffusersConfig, source: str) -> list[bool]:
    """For each level, finest first, whether it has attention: the same on both ways."""
    down, up = _with_attention(foreign.down_block_types), _with_attention(foreign.up_block_types)
    if down != up[::-1] or len(down) != len(foreign.block_out_channels):
        raise DataError(
            f"{source}: down_block_types {list(foreign.down_block_types)} and up_block_types "
            f"{list(foreign.up_block_types)} differ in more than direction"
        )
    return down


def _with_attention(blocks: Sequence[str]) -> list[bool]:
    return [block.startswith(ATTENTION) for block in blocks]


def new_name(name: str) -> str:
    """Names of attention weights before diffusers 0.18 as the later ones."""
    match = OLD_NAME.fullmatch(name)
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}" if match else name
