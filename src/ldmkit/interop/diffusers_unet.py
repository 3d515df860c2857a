"""diffusers' words for a U-Net, `UNet2DModel` and `UNet2DConditionModel`: its `config.json` and back.

The two classes say the same things differently: `attention_head_dim` is the width of a head in
the first and the number of heads (of each level) in the second.
"""

from typing import Any, Literal, NamedTuple

from pydantic import Field
from torch import nn

from ldmkit.diffusion_configs import UNetConfig
from ldmkit.errors import DataError
from ldmkit.facts import validated
from ldmkit.fields import Config, Fraction, Positive
from ldmkit.interop.unet_layout import UNET_DIFFUSERS, require_expressible
from ldmkit.networks.unet import EPS, UNet

PLAIN, ATTENDING = "UNet2DModel", "UNet2DConditionModel"
Numbers = Positive | tuple[Positive, ...]
Resample = Literal["conv", "resnet"]

DOWN_BLOCKS: dict[str, dict[str, tuple[bool, Resample | None]]] = {
    PLAIN: {
        "DownBlock2D": (False, "conv"),
        "AttnDownBlock2D": (True, None),
        "ResnetDownsampleBlock2D": (False, "resnet"),
    },
    ATTENDING: {"DownBlock2D": (False, "conv"), "CrossAttnDownBlock2D": (True, "conv")},
}
"""Whether a level has attention, and how it halves (None: as `downsample_type` says)."""
MIDDLE_BLOCKS = {PLAIN: "UNetMidBlock2D", ATTENDING: "UNetMidBlock2DCrossAttn"}

FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (EPS,),
    "class_embed_type": (None,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "cross_attention_norm": (None,),
    "attention_type": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "projection_class_embeddings_input_dim": (None,),
    "class_embeddings_concat": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
"""Settings of theirs that ours has at one value only; any other is refused."""
WITHOUT_EFFECT = {
    "addition_embed_type_num_heads",
    "num_train_timesteps",  # of a learnt table of times, which `time_embedding_type` refuses
    "upcast_attention",
    "use_linear_projection",  # a matrix or a 1x1 convolution: the shapes of the tensors say which
}


class ForeignUNet(Config):
    """What remains of a `config.json` after `FIXED`; strict."""

    sample_size: Numbers | None = None
    in_channels: Positive
    out_channels: Positive
    down_block_types: tuple[str, ...] = Field(min_length=1)
    mid_block_type: str | None = None
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[Positive, ...]
    layers_per_block: Numbers
    downsample_type: Resample = "conv"
    upsample_type: Resample = "conv"
    dropout: Fraction = 0.0
    num_class_embeds: Positive | None = None
    attention_head_dim: Numbers | None = 8
    norm_num_groups: Positive = 32
    attn_norm_num_groups: Positive | None = None
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    time_embedding_dim: Positive | None = None
    cross_attention_dim: Numbers = 1280
    transformer_layers_per_block: Numbers = 1


class ReadUNet(NamedTuple):
    """A `config.json` in our words."""

    config: UNetConfig
    channels: int
    """Of the latents."""
    use_tokens: bool
    size: tuple[int, int] | None
    """Height and width of the latents it was trained on."""
    has_classes: bool
    """Whether a table of classes is added to the time embedding."""


def read_unet(page: dict[str, Any], source: str) -> ReadUNet:
    """The U-Net that a `config.json` describes.

    Args:
        page: the file's content.
        source: how to name it in errors.

    Raises:
        DataError: another class, or something that ours cannot express; it is named.
    """
    kind = page.get("_class_name")
    if kind not in DOWN_BLOCKS:
        raise DataError(f"{source} holds {kind}; {' and '.join(DOWN_BLOCKS)} can be imported")
    stated = {key: value for key, value in page.items() if not key.startswith("_")}
    for key, values in FIXED.items():
        if stated.pop(key, values[0]) not in values:
            raise DataError(
                f"{source}: {key} {page[key]!r} has no counterpart here, where it is {values[0]!r}"
            )
    stated = {key: value for key, value in stated.items() if key not in WITHOUT_EFFECT}
    stated.setdefault("mid_block_type", MIDDLE_BLOCKS[kind])  # null stands for none at all
    theirs = validated(ForeignUNet, stated, source)
    _require_whole(theirs, kind, source)
    attends, resample = _levels(theirs, kind, source)
    widths, use_tokens = theirs.block_out_channels, kind == ATTENDING
    factors = [2**level for level, attention in enumerate(attends) if attention]
    settings = {
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "residual_blocks": _one(theirs.layers_per_block, "layers_per_block", source),
        "attention_factors": factors,
        "middle_attention": theirs.add_attention,
        "norm_groups": theirs.norm_num_groups,
        "scale_shift": theirs.resnet_time_scale_shift == "scale_shift",
        "residual_updown": resample == "resnet",
        "dropout": theirs.dropout,
    }
    if use_tokens:
        settings["context_channels"] = _one(
            theirs.cross_attention_dim, "cross_attention_dim", source
        )
        depths = theirs.transformer_layers_per_block
        if not isinstance(depths, int) and len(set(depths)) == 1:
            depths = depths[0]
        settings["transformer_depth"] = depths
    with_middle = [*attends[:-1], attends[-1] or theirs.add_attention]
    settings |= _heads(theirs, with_middle, use_tokens, source)
    size = theirs.sample_size
    if isinstance(size, int):
        size = (size, size)
    return ReadUNet(
        validated(UNetConfig, settings, source),
        theirs.in_channels,
        use_tokens,
        None if size is None else (size[0], size[-1]),
        theirs.num_class_embeds is not None,
    )


def unet_page(model: UNet, size: tuple[int, int]) -> dict[str, Any]:
    """The `config.json` of a U-Net of ours.

    Args:
        model: of the architecture in question.
        size: height and width of its latents.

    Raises:
        DataError: diffusers has no word for something in the config; it is named.
    """
    require_expressible(model, UNET_DIFFUSERS)
    config, use_tokens = model.config, model.use_tokens
    _require_blocks(model)
    attends = [factor in config.attention_factors for factor in config.factors]
    stem = "CrossAttn" if use_tokens else "Attn"
    resample = "resnet" if config.residual_updown else "conv"
    without = "Resnet{}sampleBlock2D" if config.residual_updown else "{}Block2D"
    down = [f"{stem}DownBlock2D" if a else without.format("Down") for a in attends]
    up = [f"{stem}UpBlock2D" if a else without.format("Up") for a in reversed(attends)]
    groups = next(m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm))
    page: dict[str, Any] = {
        "_class_name": ATTENDING if use_tokens else PLAIN,
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "center_input_sample": False,
        "down_block_types": down,
        "downsample_padding": 1,
        "dropout": config.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": model.conv_in.in_channels,
        "layers_per_block": config.residual_blocks,
        "norm_eps": EPS,
        "norm_num_groups": groups,
        "out_channels": model.out_channels,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "up_block_types": up,
    }
    if use_tokens:
        return page | {
            "attention_head_dim": [config.heads_of(width) for width in config.widths],
            "cross_attention_dim": config.context_channels,
            "mid_block_type": MIDDLE_BLOCKS[ATTENDING],
            "transformer_layers_per_block": [
                config.depth_of(level) for level in range(len(config.widths))
            ],
        }
    return page | {
        "add_attention": config.middle_attention,
        "attention_head_dim": _head_width(config),
        "attn_norm_num_groups": groups,  # without it scale_shift would take the middle's norm away
        "downsample_type": resample,
        "mid_block_type": MIDDLE_BLOCKS[PLAIN],
        "upsample_type": resample,
    }


def _require_whole(theirs: ForeignUNet, kind: str, source: str) -> None:
    """Refuse what the types of the fields let through and ours has not."""
    widths, groups = theirs.block_out_channels, theirs.norm_num_groups
    middle = MIDDLE_BLOCKS[kind]
    attention_groups = theirs.attn_norm_num_groups
    if attention_groups is None and theirs.resnet_time_scale_shift == "default":
        attention_groups = groups
    unlike = kind == PLAIN and theirs.add_attention and attention_groups != groups
    embedding = theirs.time_embedding_dim
    wrong = {
        f"in_channels {theirs.in_channels} and out_channels {theirs.out_channels} differ, and "
        "models of latents alone can be imported": theirs.in_channels != theirs.out_channels,
        f"mid_block_type {theirs.mid_block_type} has no counterpart here, only {middle}": (
            theirs.mid_block_type != middle
        ),
        f"block_out_channels {list(widths)} are not all multiples of the first": any(
            width % widths[0] for width in widths
        ),
        f"norm_num_groups {groups} does not divide {list(widths)}": any(
            width % groups for width in widths
        ),
        f"attn_norm_num_groups {theirs.attn_norm_num_groups} with norm_num_groups {groups} and "
        f"{theirs.resnet_time_scale_shift} time shift: ours has the same groups everywhere": unlike,
        f"num_class_embeds {theirs.num_class_embeds} beside tokens has no counterpart here": (
            kind == ATTENDING and theirs.num_class_embeds is not None
        ),
        f"time_embedding_dim {embedding} is not 4 x {widths[0]}": (
            embedding not in (None, 4 * widths[0])
        ),
    }
    for sentence, present in wrong.items():
        if present:
            raise DataError(f"{source}: {sentence}")


def _levels(theirs: ForeignUNet, kind: str, source: str) -> tuple[list[bool], str]:
    """Which levels have attention, finest first, and how all of them halve and double."""
    known, attends = DOWN_BLOCKS[kind], []
    ways: set[str] = set()
    for blocks, default in (
        (theirs.down_block_types, theirs.downsample_type),
        (theirs.up_block_types, theirs.upsample_type),
    ):
        for block in blocks:
            if block.replace("Up", "Down") not in known:
                raise DataError(f"{source}: a block {block} of {kind} has no counterpart here")
        kinds = [known[block.replace("Up", "Down")] for block in blocks]
        attends.append([attention for attention, _ in kinds])
        ways |= {way or default for _, way in kinds[:-1]}  # the last level of a way keeps its size
    if attends[0] != attends[1][::-1] or len(attends[0]) != len(theirs.block_out_channels):
        raise DataError(
            f"{source}: down_block_types {list(theirs.down_block_types)} and up_block_types "
            f"{list(theirs.up_block_types)} differ in more than direction"
        )
    if len(ways) > 1:
        raise DataError(f"{source}: some levels resample with residual blocks and some without")
    return attends[0], ways.pop() if ways else "conv"


def _heads(
    theirs: ForeignUNet, attends: list[bool], use_tokens: bool, source: str
) -> dict[str, int]:
    """Our word for heads, from `attention_head_dim` in the sense of either class."""
    stated, widths = theirs.attention_head_dim, theirs.block_out_channels
    levels = [level for level, attention in enumerate(attends) if attention]
    numbers = (stated,) * len(widths) if isinstance(stated, int | None) else stated
    if len(numbers) != len(widths):
        raise DataError(f"{source}: attention_head_dim {stated} does not give each level its own")
    counts = []
    for level in levels:
        number = numbers[level] or (0 if use_tokens else widths[level])
        if number == 0 or widths[level] % number:
            raise DataError(
                f"{source}: attention_head_dim {number} does not divide {widths[level]} channels"
            )
        counts.append(number if use_tokens else widths[level] // number)
    head_widths = {widths[level] // count for level, count in zip(levels, counts, strict=True)}
    if set(counts) <= {1}:
        return {}
    if len(head_widths) == 1 and not any(width % min(head_widths) for width in widths):
        return {"head_channels": head_widths.pop()}
    if len(set(counts)) == 1:
        return {"heads": counts[0]}
    raise DataError(
        f"{source}: attention_head_dim {stated} in levels of {list(widths)} channels gives neither "
        "one number of heads nor one width of them, which is what ours can say"
    )


def _head_width(config: UNetConfig) -> int | None:
    """`UNet2DModel` has one width of heads for all levels, or one head (None)."""
    pairs = zip(config.widths, config.factors, strict=True)
    used = {width for width, factor in pairs if factor in config.attention_factors}
    used |= {config.widths[-1]} if config.middle_attention else set()
    widths = {width // config.heads_of(width) for width in used}
    if all(config.heads_of(width) == 1 for width in used):
        return None
    if len(widths) == 1:
        return widths.pop()
    raise DataError(
        f"diffusers' {PLAIN} has one width of attention heads; {config.heads} heads in levels of "
        f"{', '.join(map(str, sorted(used)))} channels have {len(widths)} widths"
    )


def _require_blocks(model: UNet) -> None:
    config = model.config
    for what, present in (
        ("residual_updown", config.residual_updown),
        ("middle_attention off", not config.middle_attention),
    ):
        if model.use_tokens and present:
            raise DataError(f"diffusers' {ATTENDING} has no word for {what}")


def _one(numbers: int | tuple[int, ...], name: str, source: str) -> int:
    """The one number of a setting that diffusers lets differ by level."""
    different = {numbers} if isinstance(numbers, int) else set(numbers)
    if len(different) != 1:
        raise DataError(f"{source}: {name} {numbers} varies by level, which ours cannot express")
    return different.pop()
