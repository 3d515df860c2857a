"""The U-Net of the original code, read off the names and shapes of its tensors.

Such files store no config. Everything is in names and shapes but the heads of attention, which only
divide what the tensors hold together: they are typed, known from the published models, or asked for.
"""

from typing import NamedTuple

from ldmkit.diffusion_configs import UNetConfig
from ldmkit.diffusion_presets import DIFFUSION_MODELS
from ldmkit.errors import DataError
from ldmkit.facts import validated
from ldmkit.interop.layout import Tensors
from ldmkit.interop.unet_layout import UNET_LDM
from ldmkit.terminal import say

GROUPS = 32
CONTEXT = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
OWN = ("tiny", "s", "b", "l")
"""Presets that nobody published weights of."""
PUBLISHED_SCALES = {"sd-v1": 0.18215, "txt2img-1p4b": 0.18215}
"""Preset -> the scale_factor of its published config, which its file does not repeat."""


class UNetShape(NamedTuple):
    """What the tensors of a U-Net say."""

    config: UNetConfig
    """All but the heads."""
    in_channels: int
    out_channels: int
    use_tokens: bool


def unet_shape(tensors: Tensors, source: str) -> UNetShape:
    """The architecture of a U-Net.

    Args:
        tensors: without prefix. What does not fit the architecture shows when they are loaded.
        source: how to name the file in errors.

    Raises:
        DataError: a tensor that every such network has is missing, or the levels are irregular.
    """
    channels, in_channels = _shape(tensors, "input_blocks.0.0.weight", source)[:2]
    levels, per_level = _levels(tensors, source)
    firsts = [f"input_blocks.{level * per_level + 1}" for level in range(levels)]
    widths = [_shape(tensors, f"{first}.0.out_layers.3.weight", source)[0] for first in firsts]
    if any(width % channels or width % GROUPS for width in widths):
        raise DataError(
            f"{source}: a U-Net with levels of {widths} channels; such files have multiples of the "
            f"first convolution's {channels}, in {GROUPS} groups"
        )
    told = _shape(tensors, f"{firsts[0]}.0.emb_layers.1.weight", source)[0]
    use_tokens = CONTEXT in tensors
    settings = {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "residual_blocks": per_level - 1,
        "attention_factors": [
            2**level for level, first in enumerate(firsts) if f"{first}.1.norm.weight" in tensors
        ],
        "norm_groups": GROUPS,
        "scale_shift": told == 2 * widths[0],
        "residual_updown": levels > 1 and f"input_blocks.{per_level}.0.op.weight" not in tensors,
    }
    if use_tokens:
        settings["context_channels"] = _shape(tensors, CONTEXT, source)[1]
        settings["transformer_depth"] = _count(
            tensors, "middle_block.1.transformer_blocks.{}.norm1.weight"
        )
    config = validated(UNetConfig, settings, source)
    return UNetShape(config, in_channels, _shape(tensors, "out.2.weight", source)[0], use_tokens)


def published_as(shape: UNetShape) -> tuple[str, ...]:
    """The published presets of this very architecture, whatever their heads."""
    return tuple(
        name
        for name, preset in DIFFUSION_MODELS.items()
        if name not in OWN
        and preset.use is not None
        and bool(preset.use.tokens) == shape.use_tokens
        and _headless(_config_of(name), shape.use_tokens)
        == _headless(shape.config, shape.use_tokens)
    )


def with_heads(
    shape: UNetShape, heads: int | None, head_channels: int | None, source: str
) -> UNetConfig:
    """The config with its attention heads: as given, or those of the published models of this shape.

    Args:
        shape: of the network.
        heads: attention heads of every level; None if not given.
        head_channels: width of a head; None if not given.
        source: how to name the file in errors.

    Raises:
        DataError: they are neither given nor known, or divide no level.
    """
    if heads or head_channels:
        given = {"heads": heads, "head_channels": head_channels}
        return validated(UNetConfig, shape.config.model_dump() | given, source)
    known = {
        (config.heads, config.head_channels) for config in map(_config_of, published_as(shape))
    }
    if len(known) != 1:
        raise DataError(
            f"{source}: tensors do not say how many attention heads a U-Net has, and no published one "
            "has this shape: give --heads or --head-channels, as in the config it was trained with"
        )
    ((heads, head_channels),) = known
    each = f"of {head_channels} channels" if head_channels else f"{heads or 1} a level"
    say(
        f"attention heads {each}, as in the published {published_as(shape)[0]}, which has this shape; "
        "--heads or --head-channels says otherwise"
    )
    found = {"heads": heads, "head_channels": head_channels}
    return shape.config.model_copy(update=found)


def published_scale(shape: UNetShape) -> float | None:
    """The scale_factor of the published models of this shape, where their config alone says it."""
    return next((PUBLISHED_SCALES[n] for n in published_as(shape) if n in PUBLISHED_SCALES), None)


def published_side(shape: UNetShape) -> int | None:
    """The side of the latents that the published models of this shape were trained on, in cells."""
    uses = (DIFFUSION_MODELS[name].use for name in published_as(shape))
    sides = {use.latents[1] for use in uses if use and use.latents[0] == shape.out_channels}
    return sides.pop() if len(sides) == 1 else None


def _config_of(preset: str) -> UNetConfig:
    return UNetConfig.model_validate(DIFFUSION_MODELS[preset].settings["unet"])


def _headless(config: UNetConfig, use_tokens: bool) -> dict[str, object]:
    settings = config.model_dump(exclude={"heads", "head_channels", "dropout"})
    settings["attention_factors"] = sorted(config.attention_factors)
    if not use_tokens:
        del settings["context_channels"], settings["transformer_depth"]
    return settings


def _levels(tensors: Tensors, source: str) -> tuple[int, int]:
    """How many levels, and how many blocks each has on the way up.

    The last block of each level but one ends in doubling, behind its attention where it has one: a
    convolution, or a residual block, which is how the two are told apart from attention.
    """
    blocks = _count(tensors, "output_blocks.{}.0.in_layers.0.weight")
    ends = [
        any(
            f"output_blocks.{block}.{slot}.{part}.weight" in tensors
            for slot in (1, 2)
            for part in ("conv", "in_layers.0")
        )
        for block in range(blocks)
    ]
    levels = sum(ends) + 1
    per_level = blocks // levels
    regular = [(block + 1) % max(per_level, 1) == 0 for block in range(blocks - 1)]
    if per_level < 2 or blocks % levels or ends[:-1] != regular:
        raise DataError(
            f"{source}: a U-Net of {blocks} blocks on the way up ({UNET_LDM.project} layout), doubling "
            f"{sum(ends)} times, is not made of levels with equally many blocks"
        )
    return levels, per_level


def _count(tensors: Tensors, pattern: str) -> int:
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number


def _shape(tensors: Tensors, name: str, source: str) -> tuple[int, ...]:
    if name not in tensors:
        raise DataError(f"{source} lacks tensor {name}: it holds no U-Net of this kind")
    shape = tuple(tensors[name].shape)
    if len(shape) not in (2, 4):
        raise DataError(
            f"{source}: tensor {name} has {len(shape)} dimensions; U-Nets of pictures have 2 or 4 there"
        )
    return shape
