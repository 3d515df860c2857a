"""The U-Net's tensor names against other projects', in both directions from one table.

`unet_names` is the only place that walks our names; both directions use it. The layouts of the code
published with the paper and of diffusers are at the foot. Pure naming: no file is touched.

Three things differ beside names. Plain attention has its queries, keys and values fused here; diffusers has
three matrices, the original code one 1-d convolution whose rows are sorted by head first and then
by query, key and value (its "legacy" order), where ours are sorted by query, key and value first.
Embeddings of classes are conditioners here: `class_table` names theirs. Transformers are called the same
in both.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ldmkit.diffusion_configs import UNetConfig
from ldmkit.errors import DataError
from ldmkit.interop.layout import Tensors
from ldmkit.modelfile import require_tensors
from ldmkit.networks.unet import UNet

STAGE = re.compile(r"(down|up)\.(\d+)\.stages\.(\d+)\.(residual|attention)\.(.+)")
RESAMPLE = re.compile(r"(down|up)\.(\d+)\.(?:down|up)sample(?:\.(.+))?")
MIDDLE = re.compile(r"middle_(in|out)\.(?:(attention|residual)\.)?(.+)")
TRANSFORMER = (
    (re.compile(r"^blocks\."), "transformer_blocks."),
    (re.compile(r"\.self_attention\."), ".attn1."),
    (re.compile(r"\.cross_attention\."), ".attn2."),
    (re.compile(r"to_out$"), "to_out.0"),
    (re.compile(r"feed_forward\.expand$"), "ff.net.0.proj"),
    (re.compile(r"feed_forward\.contract$"), "ff.net.2"),
    (re.compile(r"^project_"), "proj_"),
)


class UNetLayout(NamedTuple):
    """What another project calls the parts of a U-Net.

    Patterns may use way (down, up), side (input, output), step (level, 0 = run first), number (of the
    stage in it), place (running number of the block) and slot (of the last part in its block).
    """

    project: str
    block: str
    attention: str
    downsample: str
    upsample: str
    residual_resample: str
    """A residual block that halves or doubles."""
    middle_block: str
    middle_attention: str
    block_parts: dict[str, str]
    """Ours -> theirs, where they differ."""
    attention_parts: dict[str, tuple[str, ...]]
    """Of plain attention; our fused `qkv` may have three names there."""
    outside: dict[str, str]
    class_table: str
    """The table of classes that is added to the time embedding."""
    legacy_order: bool
    """Whether a fused `qkv` is a 1-d convolution with rows sorted by head first."""
    groups: int | None
    """The one number of norm groups that the project knows; None for any that all levels share."""


def unet_names(name: str, model: UNet, layout: UNetLayout) -> tuple[str, ...]:
    """What the layout calls a tensor of our U-Net: one name, or three for a fused `qkv`.

    Args:
        name: as in `model.state_dict()`.
        model: of the architecture in question; it may be without memory.
        layout: whose names are wanted.
    """
    config = model.config
    module, _, leaf = name.rpartition(".")
    if match := STAGE.fullmatch(module):
        place = _place(match[1], int(match[2]), int(match[3]), config)
        kind, part = match[4], match[5]
        pattern = layout.block if kind == "residual" else layout.attention
    elif match := RESAMPLE.fullmatch(module):
        place = _place(match[1], int(match[2]), config.residual_blocks, config)
        if not config.residual_updown:
            pattern = layout.downsample if match[1] == "down" else layout.upsample
            return (f"{pattern.format(**place)}.{leaf}",)
        kind, part, pattern = "residual", match[3], layout.residual_resample
    elif match := MIDDLE.fullmatch(module):
        last = match[1] == "out"
        place = {"number": int(last), "slot": (1 + config.middle_attention) * last}
        kind, part = match[2] or "residual", match[3]
        pattern = layout.middle_block if kind == "residual" else layout.middle_attention
    else:
        return (f"{layout.outside.get(module, module)}.{leaf}",)
    if kind == "residual":
        parts = (layout.block_parts.get(part, part),)
    else:
        parts = (_in_transformer(part),) if model.use_tokens else layout.attention_parts[part]
    return tuple(f"{pattern.format(**place)}.{part}.{leaf}" for part in parts)


def to_foreign_unet(model: UNet, layout: UNetLayout) -> Tensors:
    """The tensors of a U-Net of ours under their names and in their shapes, without prefix.

    Raises:
        DataError: the layout has no word for something in the config; it is named.
    """
    require_expressible(model, layout)
    return _foreign(model.state_dict(), model, layout)


def load_foreign_unet(
    model: UNet, found: Mapping[str, Tensor], layout: UNetLayout, source: str
) -> None:
    """Put their tensors into a U-Net of ours, float32.

    Args:
        model: of the architecture in question; it may be without memory.
        found: their tensors, exactly those that such a U-Net has, without prefix.
        layout: whose names they are.
        source: how to name the file in errors.

    Raises:
        DataError: a tensor is missing, unknown, of the wrong shape or not finite, or the layout has
            no word for something in the config; it is named.
    """
    require_expressible(model, layout)
    own = model.state_dict()
    wanted = _foreign({name: tensor.to("meta") for name, tensor in own.items()}, model, layout)
    found = {name: _shaped_like(tensor, wanted.get(name)) for name, tensor in found.items()}
    require_tensors(wanted, found, source)
    for name, tensor in found.items():
        if not tensor.float().isfinite().all():
            raise DataError(f"{source}: tensor {name} holds values that are not finite")
    ours = {}
    for name, tensor in own.items():
        theirs = torch.cat([found[key].float() for key in unet_names(name, model, layout)])
        if _is_plain_attention(name):
            theirs = _sorted_rows(theirs, name, model.config, layout, back=True)
        ours[name] = theirs.reshape(tensor.shape).clone()
    model.load_state_dict(ours, assign=True)


def require_expressible(model: UNet, layout: UNetLayout) -> None:
    """Check that the other project has a word for everything in the config.

    Raises:
        DataError: it has none for something; it is named.
    """
    config = model.config
    levels = [level for level, f in enumerate(config.factors) if f in config.attention_factors]
    depths = {config.depth_of(level) for level in (*levels, len(config.factors) - 1)}
    ldm = layout.groups is not None  # the original code, which has no option that it did not need
    foreign = {
        "qk_norm": config.qk_norm,
        "norm rms": config.norm == "rms",
        "self_conditioning": config.self_conditioning,
        f"a first multiplier of {config.multipliers[0]}": config.multipliers[0] != 1,
        "middle_attention off": ldm and not config.middle_attention,
        "a transformer_depth that varies": ldm and model.use_tokens and len(depths) > 1,
    }
    for what, present in foreign.items():
        if present:
            raise DataError(f"the {layout.project} layout has no word for {what} in a U-Net")
    groups = {norm.num_groups for norm in model.modules() if isinstance(norm, nn.GroupNorm)}
    if len(groups) > 1 or layout.groups not in (None, *groups):
        raise DataError(
            f"the {layout.project} layout normalises in {layout.groups or 'one number of'} groups "
            f"everywhere; this U-Net in {', '.join(map(str, sorted(groups)))} (norm_groups "
            f"{config.norm_groups}, levels of {', '.join(map(str, config.widths))} channels)"
        )


def _foreign(tensors: Mapping[str, Tensor], model: UNet, layout: UNetLayout) -> Tensors:
    result = {}
    for name, tensor in tensors.items():
        theirs = unet_names(name, model, layout)
        if _is_plain_attention(name):
            tensor = _sorted_rows(tensor, name, model.config, layout, back=False)
        chunks = tensor.chunk(len(theirs))
        result |= {key: chunk.contiguous() for key, chunk in zip(theirs, chunks, strict=True)}
    return result


def _place(way: str, step: int, number: int, config: UNetConfig) -> dict[str, str | int]:
    """Where a block is; the last number of a level is that of its halving or doubling."""
    down, blocks = way == "down", config.residual_blocks
    level = step if down else len(config.multipliers) - 1 - step
    attends = 2**level in config.attention_factors
    return {
        "way": way,
        "side": "input" if down else "output",
        "step": step,
        "number": number,
        "place": step * (blocks + 1)
        + number
        + down,  # the first of the way down is the convolution
        "slot": 0 if down else 1 + attends,  # going up, doubling is part of the level's last block
    }


def _in_transformer(part: str) -> str:
    for pattern, theirs in TRANSFORMER:
        part = pattern.sub(theirs, part)
    return part


def _is_plain_attention(name: str) -> bool:
    return name.endswith((".qkv.weight", ".qkv.bias", ".attention.out.weight"))


def _sorted_rows(
    tensor: Tensor, name: str, config: UNetConfig, layout: UNetLayout, *, back: bool
) -> Tensor:
    """Weights of plain attention as matrices or 1-d convolutions, their rows in the other's order."""
    tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
    if layout.legacy_order and ".qkv." in name:
        heads = config.heads_of(len(tensor) // 3)
        ours, legacy = "(three heads width) ...", "(heads three width) ..."
        order = f"{legacy} -> {ours}" if back else f"{ours} -> {legacy}"
        tensor = rearrange(tensor, order, three=3, heads=heads)
    return tensor[..., None] if layout.legacy_order and tensor.ndim > 1 else tensor


def _shaped_like(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """A matrix for a 1x1 convolution and the reverse, as files of different ages have them."""
    if wanted is None or tensor.ndim == wanted.ndim or min(tensor.ndim, wanted.ndim) < 2:
        return tensor
    alike = tensor.shape[:2] == wanted.shape[:2] and tensor.numel() == wanted.numel()
    return tensor.reshape(wanted.shape) if alike else tensor


UNET_DIFFUSERS = UNetLayout(
    project="diffusers",
    block="{way}_blocks.{step}.resnets.{number}",
    attention="{way}_blocks.{step}.attentions.{number}",
    downsample="down_blocks.{step}.downsamplers.0.conv",
    upsample="up_blocks.{step}.upsamplers.0.conv",
    residual_resample="{way}_blocks.{step}.{way}samplers.0",
    middle_block="mid_block.resnets.{number}",
    middle_attention="mid_block.attentions.0",
    block_parts={"embed": "time_emb_proj", "skip": "conv_shortcut"},
    attention_parts={
        "norm": ("group_norm",),
        "qkv": ("to_q", "to_k", "to_v"),
        "out": ("to_out.0",),
    },
    outside={
        "embed_time.0": "time_embedding.linear_1",
        "embed_time.2": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
    },
    class_table="class_embedding.weight",
    legacy_order=False,
    groups=None,
)
UNET_LDM = UNetLayout(
    project="ldm",
    block="{side}_blocks.{place}.0",
    attention="{side}_blocks.{place}.1",
    downsample="input_blocks.{place}.0.op",
    upsample="output_blocks.{place}.{slot}.conv",
    residual_resample="{side}_blocks.{place}.{slot}",
    middle_block="middle_block.{slot}",
    middle_attention="middle_block.1",
    block_parts={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embed": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    attention_parts={"norm": ("norm",), "qkv": ("qkv",), "out": ("proj_out",)},
    outside={
        "embed_time.0": "time_embed.0",
        "embed_time.2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    },
    class_table="label_emb.weight",
    legacy_order=True,
    groups=32,
)
LDM_PREFIX = "model.diffusion_model."
"""Before the U-Net's names in a whole model's file of the original code."""
