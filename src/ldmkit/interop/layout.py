"""Our tensor names against another project's, in both directions from one table.

A `Layout` says what the other project calls each part; `foreign_names` is the only place that walks
our names, and both directions use it, so they cannot drift apart. Pure naming: no file is touched.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.errors import DataError
from ldmkit.modelfile import require_tensors

Tensors = dict[str, Tensor]
LEVEL = re.compile(r"(encoder|decoder)\.levels\.(\d+)\.(\d+)\.(\w+)")
MIDDLE = re.compile(r"(encoder|decoder)\.middle\.(\d+)\.(\w+)")
ATTENTION_PARTS = ("norm", "qkv", "out")
WAY = {"encoder": "down", "decoder": "up"}


class Layout(NamedTuple):
    """What another project calls the parts of an autoencoder."""

    block: str
    """Residual block of a level; may use half, way, level (0 = finest), step (0 = run first), number."""
    attention: str
    resample: str
    middle_block: str
    """`number` counts from 0, `nth` from 1."""
    middle_attention: str
    block_parts: dict[str, str]
    """Ours -> theirs, where they differ."""
    attention_parts: dict[str, tuple[str, ...]]
    """Our fused `qkv` has three names there."""
    outside: dict[str, str]
    """Modules outside levels and middle, where their names differ."""
    linear_attention: bool
    """Whether attention weights are matrices [C, C] there, not 1x1 convolutions [C, C, 1, 1]."""


class Imported(NamedTuple):
    """An autoencoder of another project, and what its file said beside the weights."""

    model: Autoencoder
    size: int | None
    """Picture size it was made for, pixels."""
    scaling: dict[str, Any]
    """Factors by which its diffusion model scaled latents; ours are raw, so they are only recorded."""
    dropped: tuple[str, ...]
    """Names of tensors left out: of losses, optimizers, other models in the same file."""


def foreign_names(name: str, config: AutoencoderConfig, layout: Layout) -> tuple[str, ...]:
    """What the layout calls a tensor of ours: one name, or three for a fused `qkv`."""
    if name in layout.outside:
        return (layout.outside[name],)
    module, _, leaf = name.rpartition(".")
    if match := LEVEL.fullmatch(module):
        half, step, stage, part = match[1], int(match[2]), int(match[3]), match[4]
        count = len(config.multipliers)
        level = step if half == "encoder" else count - 1 - step
        attends = 2**level in config.attention_factors
        place = {"half": half, "way": WAY[half], "level": level, "step": step}
        place["number"] = stage // 2 if attends else stage
        if part == "conv":
            return (f"{layout.resample.format(**place)}.{leaf}",)
        pattern = layout.attention if part in ATTENTION_PARTS else layout.block
    elif match := MIDDLE.fullmatch(module):
        half, stage, part = match[1], int(match[2]), match[3]
        number = min(stage, 1)  # with or without attention between them, the blocks are two
        place = {"half": half, "number": number, "nth": number + 1}
        pattern = layout.middle_attention if part in ATTENTION_PARTS else layout.middle_block
    else:
        return (f"{layout.outside.get(module, module)}.{leaf}",)
    if part in ATTENTION_PARTS:
        parts = layout.attention_parts.get(part, (part,))
    else:
        parts = (layout.block_parts.get(part, part),)
    return tuple(f"{pattern.format(**place)}.{theirs}.{leaf}" for theirs in parts)


def to_foreign(tensors: Mapping[str, Tensor], config: AutoencoderConfig, layout: Layout) -> Tensors:
    """Our tensors under their names and in their shapes."""
    result = {}
    for name, tensor in tensors.items():
        theirs = foreign_names(name, config, layout)
        if layout.linear_attention and _is_attention_weight(name):
            tensor = tensor.flatten(1)
        chunks = tensor.chunk(len(theirs))
        result |= {key: chunk.contiguous() for key, chunk in zip(theirs, chunks, strict=True)}
    return result


def to_model(
    found: Mapping[str, Tensor],
    config: AutoencoderConfig,
    image_channels: int,
    layout: Layout,
    source: str,
) -> Autoencoder:
    """An autoencoder of ours with their tensors, float32, ready to run.

    Args:
        found: their tensors, exactly those that such an autoencoder has.
        config: architecture.
        image_channels: of the pictures.
        layout: whose names they are.
        source: how to name the file in errors.

    Raises:
        DataError: a tensor is missing, unknown, of the wrong shape or not finite; it is named.
    """
    with torch.device("meta"):
        model = Autoencoder(config, image_channels)
    wanted = to_foreign(model.state_dict(), config, layout)
    found = {name: _shaped_like(tensor, wanted.get(name)) for name, tensor in found.items()}
    require_tensors(wanted, found, source)
    for name, tensor in found.items():
        if not tensor.float().isfinite().all():
            raise DataError(f"{source}: tensor {name} holds values that are not finite")
    ours = {}
    for name, tensor in model.state_dict().items():
        theirs = foreign_names(name, config, layout)
        ours[name] = torch.cat([found[key].float() for key in theirs]).view(tensor.shape)
    model.load_state_dict(ours, assign=True)
    return model.eval().requires_grad_(False)


def _is_attention_weight(name: str) -> bool:
    return name.endswith((".qkv.weight", ".out.weight"))


def _shaped_like(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """A matrix for a 1x1 convolution and the reverse, as files of different ages have them."""
    if wanted is None or {tensor.ndim, wanted.ndim} != {2, 4}:
        return tensor
    longer = max(tensor.shape, wanted.shape, key=len)
    return tensor.reshape(tensor.shape[:2] + wanted.shape[2:]) if longer[2:] == (1, 1) else tensor
